"""The optimisation guide for one machine, in English and Chinese: every sentence is computed from a run.

The two numbers of the source guide that stand in it are quoted as that guide's, measured on another machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from numa_lab.machine.shell_commands import to_paste
from numa_lab.measurement import comparison
from numa_lab.measurement.labels import is_local
from numa_lab.measurement.machine_facts import Machine
from numa_lab.measurement.pairwise import Comparisons
from numa_lab.placement.binding import Binding
from numa_lab.report import verdicts

SOURCE_CLAIMS = {"gqa": 0.1707, "mha": 0.0437}  # slowest against fastest node, GQA and standard attention


@dataclass(frozen=True)
class Section:
    """A heading, and its sentences."""

    title: str
    sentences: tuple[str, ...]


def sections(rows: pd.DataFrame, machine: Machine, compared: Comparisons, language: str = "en") -> list[Section]:
    """The guide's sections in one language: which node, remote memory, threads, batches, commands, what stays open."""
    text: _English | _Chinese = _Chinese() if language == "zh" else _English()
    facts = _Facts(rows, machine, compared)
    found = [
        Section(text.node_title, (text.node(facts), text.source(facts))),
        Section(text.remote_title, (text.remote(facts),)),
        Section(text.threads_title, (text.threads(facts), text.limit(facts))),
        Section(text.batch_title, (text.batch(facts),)),
        Section(text.open_title, (text.unclear(facts),)),
    ]
    if machine.topology.emulated:
        found.insert(0, Section(text.emulated_title, (text.emulated,)))
    return found


def markdown(rows: pd.DataFrame, machine: Machine, compared: Comparisons, language: str = "en") -> str:
    """The guide as Markdown, with the commands for this machine."""
    parts = [
        f"### {s.title}\n\n" + " ".join(filter(None, s.sentences)) for s in sections(rows, machine, compared, language)
    ]
    title = {"en": "Commands for this machine", "zh": "本机可用的命令"}[language]
    lines = [f"# {purpose}\n{command}" for purpose, command in verdicts.commands(rows, machine, compared)]
    return "\n\n".join([*parts, f"### {title}\n\n```bash\n" + "\n".join(lines) + "\n```"])


class _Facts:
    """What the sentences of both languages say, as numbers."""

    def __init__(self, rows: pd.DataFrame, machine: Machine, compared: Comparisons) -> None:
        self.floor = compared.noise_floor
        self.local = [label for label in verdicts.bindings(rows) if is_local(label)]
        self.nodes = len(machine.topology.effective_nodes)
        self.best = verdicts.best_node(compared)
        self.tie = verdicts.nodes_tie(compared)
        self.slow = ", ".join(map(str, verdicts.slow_nodes(compared)))
        self.differ = verdicts.nodes_differ(compared)
        self.executions = int(comparison.execution_medians(rows).groupby("label")["execution_id"].nunique().min())
        self.unclear = sum(c.verdict == "unclear" for c in compared.comparisons)
        self.compared = len(compared.comparisons)
        # The same CPUs with other memory: a different number of threads would be another comparison.
        remote = [
            c
            for c in compared.comparisons
            for a, b in [(Binding.parse(c.a), Binding.parse(c.b))]
            if a.is_local != b.is_local and a.cpu_nodes == b.cpu_nodes and a.mem_nodes != b.mem_nodes
        ]
        self.remote_measured = bool(remote)
        costs = [c.ratio if is_local(c.b) else 1 / c.ratio for c in remote if c.verdict in ("slower", "faster")]
        self.remote_costs = sorted(costs)
        spread = comparison.spread(rows)
        self.spreads = {
            str(kind): float(value)
            for kind, value in spread[spread["phase"] == "decode"].groupby("attention")["spread"].median().items()
            if not math.isnan(value)
        }
        here = rows[rows["label"].isin(self.local or verdicts.bindings(rows))]
        self.threads = _thread_gain(here)
        self.batch = _batch_gain(here)
        self.limit_sentence = verdicts.limit_sentence(rows)
        self.shares = verdicts.limit_shares(rows)


def _thread_gain(rows: pd.DataFrame) -> tuple[int, float, int] | None:
    """Most threads measured in decode, their speed-up over one, and the fewest threads within 5 % of the best time."""
    medians = comparison.execution_medians(rows[rows["phase"] == "decode"])
    sizes = [name for name in comparison.CASE if name != "threads"]
    for _, case in medians.groupby(sizes, sort=False):
        times = case.groupby("threads")["seconds"].median()
        if len(times) > 1:
            enough = int(times[times <= 1.05 * times.min()].index.min())
            return int(times.index.max()), float(times.iloc[0] / times.iloc[-1]), enough
    return None


def _batch_gain(rows: pd.DataFrame) -> tuple[int, float] | None:
    """Largest batch measured in decode, and its tokens per second over those of a batch of one."""
    medians = comparison.execution_medians(rows[rows["phase"] == "decode"])
    sizes = [name for name in comparison.CASE if name != "batch"]
    for _, case in medians.groupby(sizes, sort=False):
        times = case.groupby("batch")["seconds"].median()
        if len(times) > 1:
            largest, smallest = int(times.index.max()), int(times.index.min())
            return largest, float(largest / times[largest] / (smallest / times[smallest]))
    return None


def _percent(share: float) -> str:
    return "?" if math.isnan(share) else f"{share:.1%}"


def _range(costs: list[float]) -> str:
    return f"{costs[0]:.2f}" if costs[0] == costs[-1] else f"{costs[0]:.2f}-{costs[-1]:.2f}"


class _English:
    emulated_title = "These times mean nothing"
    emulated = "The processor is emulated by software: trust the placement that is shown here, and none of the times."
    node_title = "Which node"
    remote_title = "Memory of another node"
    threads_title = "How many threads"
    batch_title = "Batches"
    open_title = "What could not be concluded"

    def node(self, f: _Facts) -> str:
        if f.nodes < 2:
            return "There is one node with CPUs and memory: nothing to choose."
        if len(f.local) < 2:
            local = to_paste("numa-lab", "sweep", "--bindings", "local")
            return f"{len(f.local)} of {f.nodes} nodes was measured with its own memory: run `{local}`."
        if f.best is not None:
            return f"Node {f.best} is the fastest for local memory: bind there, and look for the cause (load, memory modules)."
        if f.tie:
            return f"The {len(f.local)} nodes tie: take any, and keep memory on it."
        if f.slow:
            return f"Avoid node {f.slow}, shown to be slower than another; the rest could not be ranked. Keep memory on the node."
        if f.differ:
            return "Nodes differ in some cases, and none is the fastest throughout: take any, and keep memory on it."
        return (
            f"The {len(f.local)} nodes could not be told apart, nor shown to be equal (noise floor {_percent(f.floor)}): "
            "take any, and keep memory on it."
        )

    def source(self, f: _Facts) -> str:
        quoted = ", ".join(
            f"{name}: {_percent(f.spreads[kind]) if kind in f.spreads else 'not comparable'} here, "
            f"{SOURCE_CLAIMS[kind]:.2%} in the source guide"
            for kind, name in (("gqa", "GQA"), ("mha", "standard attention"))
        )
        return f"Slowest against fastest local node, decode: {quoted}."

    def remote(self, f: _Facts) -> str:
        if not f.remote_measured:
            return "No other node's memory was measured."
        if not f.remote_costs:
            return f"No cost of other nodes' memory was found above the noise floor of {_percent(f.floor)}."
        cost = _range(f.remote_costs)
        return f"Where a difference was shown, memory of another node, or none bound, takes {cost} times as long."

    def threads(self, f: _Facts) -> str:
        if f.threads is None:
            return "One thread count was measured."
        most, gain, enough = f.threads
        return f"{most} threads decode {gain:.2f} times as fast as one; {enough} come within 5 % of the best."

    def limit(self, f: _Facts) -> str:
        return f.limit_sentence

    def batch(self, f: _Facts) -> str:
        several = " Give each node whole sequences: one process per node." if len(f.local) > 1 else ""
        if f.batch is None:
            return "One batch size was measured." + several
        return (
            f"A batch of {f.batch[0]} decodes {f.batch[1]:.2f} times the tokens per second of a batch of one.{several}"
        )

    def unclear(self, f: _Facts) -> str:
        if not f.compared:
            return f"With one binding there was nothing to compare; it was run {f.executions} time(s)."
        return (
            f"{f.unclear} of {f.compared} comparisons stayed unclear with {f.executions} execution(s) per binding"
            + ("; more executions (`--profile standard`) narrow the intervals." if f.unclear else ".")
        )


class _Chinese:
    emulated_title = "时间数据无效"
    emulated = "处理器由软件模拟：这里显示的线程与内存位置可信，时间一律不可信。"
    node_title = "选择哪个节点"
    remote_title = "其他节点的内存"
    threads_title = "线程数"
    batch_title = "批量处理"
    open_title = "尚无结论的部分"

    def node(self, f: _Facts) -> str:
        if f.nodes < 2:
            return "只有一个节点同时拥有 CPU 和内存，无需选择。"
        if len(f.local) < 2:
            local = to_paste("numa-lab", "sweep", "--bindings", "local")
            return f"{f.nodes} 个节点中只有 {len(f.local)} 个测量了本地内存：请运行 `{local}`。"
        if f.best is not None:
            return f"就本地内存而言节点 {f.best} 最快：请绑定到该节点，并查明原因（负载、内存条配置）。"
        if f.tie:
            return f"{len(f.local)} 个节点速度相同：任选其一，并把内存留在该节点。"
        if f.slow:
            return f"避开节点 {f.slow}：已证实慢于其他节点；其余节点未能排出先后。请把内存留在所用节点。"
        if f.differ:
            return "节点之间在部分情形下有差别，但没有一个始终最快：任选其一，并把内存留在该节点。"
        return (
            f"{len(f.local)} 个节点既未能区分，也未能证明相同（噪声 {_percent(f.floor)}）："
            "任选其一，并把内存留在该节点。"
        )

    def source(self, f: _Facts) -> str:
        quoted = "，".join(
            f"{name}：本机 {_percent(f.spreads[kind]) if kind in f.spreads else '无法比较'}，"
            f"原指南 {SOURCE_CLAIMS[kind]:.2%}"
            for kind, name in (("gqa", "GQA"), ("mha", "标准注意力"))
        )
        return f"解码时最慢与最快本地节点之差，{quoted}。"

    def remote(self, f: _Facts) -> str:
        if not f.remote_measured:
            return "没有测量其他节点的内存。"
        if not f.remote_costs:
            return f"未发现超过 {_percent(f.floor)} 噪声的跨节点开销。"
        return f"在能证实差别的情形中，使用其他节点的内存或不绑定，耗时为本地的 {_range(f.remote_costs)} 倍。"

    def threads(self, f: _Facts) -> str:
        if f.threads is None:
            return "只测量了一种线程数。"
        most, gain, enough = f.threads
        return f"{most} 个线程的解码速度是单线程的 {gain:.2f} 倍；{enough} 个线程即可达到最佳时间的 5 % 以内。"

    def limit(self, f: _Facts) -> str:
        if not f.shares:
            return "没有测量解码，因此无法与内存带宽上限比较。"
        low, high = f.shares
        return f"解码达到内存读带宽上限的 {low:.0%} 至 {high:.0%}。"

    def batch(self, f: _Facts) -> str:
        several = "请把完整的序列分给各个节点：每个节点一个进程。" if len(f.local) > 1 else ""
        if f.batch is None:
            return "只测量了一种批量。" + several
        return f"批量为 {f.batch[0]} 时，每秒解码的词元数是批量为 1 时的 {f.batch[1]:.2f} 倍。{several}"

    def unclear(self, f: _Facts) -> str:
        if not f.compared:
            return f"只有一种绑定，没有可比较的对象；它运行了 {f.executions} 次。"
        more = "；增加运行次数（`--profile standard`）可缩小区间。" if f.unclear else "。"
        return f"每种绑定运行 {f.executions} 次，{f.compared} 个比较中有 {f.unclear} 个尚不明确{more}"
