"""The optimisation guide for one machine: what it says is decided here once, from a run, and worded by ``guide_texts``.

The two numbers of the source guide that stand in it are quoted as that guide's, measured on another machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from numa_lab.machine.shell_commands import to_paste
from numa_lab.measurement import comparison
from numa_lab.measurement.labels import is_local
from numa_lab.measurement.machine_facts import Machine
from numa_lab.measurement.pairwise import Comparisons
from numa_lab.placement.binding import Binding
from numa_lab.report import guide_texts, verdicts

SOURCE_CLAIMS = {"gqa": 0.1707, "mha": 0.0437}  # slowest against fastest node, GQA and standard attention


@dataclass(frozen=True)
class Statement:
    """What the guide has decided to say: the name of a sentence (``guide_texts``), and the values that stand in it."""

    name: str
    values: Mapping[str, object] = field(default_factory=dict)

    def text(self, language: str) -> str:
        """Return the sentence in one language; a value that is None could not be compared."""
        texts = guide_texts.LANGUAGES[language]
        values = {name: texts["not comparable"] if value is None else value for name, value in self.values.items()}
        return texts[self.name].format(**values)


@dataclass(frozen=True)
class Section:
    """A heading, and its sentences."""

    title: str
    sentences: tuple[str, ...]


def sections(rows: pd.DataFrame, machine: Machine, compared: Comparisons, language: str = "en") -> list[Section]:
    """Return the guide's sections in one language: which node, remote memory, threads, batches, what stays open."""
    return [
        Section(guide_texts.LANGUAGES[language][f"{topic} title"], tuple(each.text(language) for each in statements))
        for topic, statements in decide(rows, machine, compared).items()
    ]


def markdown(rows: pd.DataFrame, machine: Machine, compared: Comparisons, language: str = "en") -> str:
    """Return the guide as Markdown, with the commands for this machine."""
    texts = guide_texts.LANGUAGES[language]
    parts = [
        f"### {section.title}\n\n" + texts["between sentences"].join(section.sentences)
        for section in sections(rows, machine, compared, language)
    ]
    lines = [f"# {purpose}\n{command}" for purpose, command in verdicts.commands(rows, machine, compared)]
    return "\n\n".join([*parts, f"### {texts['commands title']}\n\n```bash\n" + "\n".join(lines) + "\n```"])


def decide(rows: pd.DataFrame, machine: Machine, compared: Comparisons) -> dict[str, list[Statement]]:
    """Decide what the guide says of each topic, whatever the language: ``{topic: statements}`` in the order of the page."""
    local = [label for label in verdicts.bindings(rows) if is_local(label)]
    here = rows[rows["label"].isin(local or verdicts.bindings(rows))]
    decided = {
        "node": [_node(local, machine, compared), _source(rows)],
        "remote": [_remote(compared)],
        "threads": [_threads(here), _limit(rows)],
        "batch": [_batch(here), *([Statement("batch over nodes")] if len(local) > 1 else [])],
        "open": [_open(rows, compared)],
    }
    return {"emulated": [Statement("emulated")], **decided} if machine.topology.emulated else decided


def _node(local: Sequence[str], machine: Machine, compared: Comparisons) -> Statement:
    """Decide which node to take."""
    nodes, slow = len(machine.topology.effective_nodes), verdicts.slow_nodes(compared)
    if nodes < 2:
        return Statement("one node")
    if len(local) < 2:
        command = to_paste("numa-lab", "sweep", "--bindings", "local")
        return Statement("nodes not measured", {"measured": len(local), "nodes": nodes, "command": command})
    if (best := verdicts.best_node(compared)) is not None:
        return Statement("best node", {"node": best})
    if verdicts.nodes_tie(compared):
        return Statement("nodes tie", {"nodes": len(local)})
    if slow:
        return Statement("slow nodes", {"nodes": ", ".join(map(str, slow))})
    if verdicts.nodes_differ(compared):
        return Statement("nodes differ")
    return Statement("nodes unclear", {"nodes": len(local), "floor": _percent(compared.noise_floor)})


def _source(rows: pd.DataFrame) -> Statement:
    """Set the slowest node against the fastest, beside what the source guide found."""
    spread = comparison.spread(rows)
    decode = spread[spread["phase"] == "decode"].groupby("attention")["spread"].median()
    values: dict[str, object] = {}
    for kind, claim in SOURCE_CLAIMS.items():
        share = float(decode.get(kind, math.nan))
        values |= {kind: None if math.isnan(share) else _percent(share), f"{kind}_claim": f"{claim:.2%}"}
    return Statement("source", values)


def _remote(compared: Comparisons) -> Statement:
    """Decide what is said of memory of other nodes."""
    # The same CPUs with other memory: a different number of threads would be another comparison.
    remote = [
        c
        for c in compared.comparisons
        for a, b in [(Binding.parse(c.a), Binding.parse(c.b))]
        if a.is_local != b.is_local and a.cpu_nodes == b.cpu_nodes and a.mem_nodes != b.mem_nodes
    ]
    if not remote:
        return Statement("remote not measured")
    costs = sorted(c.ratio if is_local(c.b) else 1 / c.ratio for c in remote if c.verdict in ("slower", "faster"))
    if not costs:
        return Statement("no remote cost", {"floor": _percent(compared.noise_floor)})
    return Statement("remote cost", {"cost": _range(costs)})


def _threads(rows: pd.DataFrame) -> Statement:
    """Decide what is said of the number of threads."""
    if (gain := _thread_gain(rows)) is None:
        return Statement("one thread count")
    most, speedup, enough = gain
    return Statement("threads", {"most": most, "gain": f"{speedup:.2f}", "enough": enough})


def _limit(rows: pd.DataFrame) -> Statement:
    """Set decode against the memory limit."""
    sentence = verdicts.limit_sentence(rows)
    if (shares := verdicts.limit_shares(rows)) is None:
        return Statement("no limit", {"sentence": sentence})
    return Statement("limit", {"sentence": sentence, "low": f"{shares[0]:.0%}", "high": f"{shares[1]:.0%}"})


def _batch(rows: pd.DataFrame) -> Statement:
    """Decide what is said of batches."""
    if (gain := _batch_gain(rows)) is None:
        return Statement("one batch size")
    return Statement("batch", {"largest": gain[0], "gain": f"{gain[1]:.2f}"})


def _open(rows: pd.DataFrame, compared: Comparisons) -> Statement:
    """Decide what is said of comparisons that stayed open."""
    executions = int(comparison.execution_medians(rows).groupby("label")["execution_id"].nunique().min())
    if not compared.comparisons:
        return Statement("nothing compared", {"executions": executions})
    unclear = sum(c.verdict == "unclear" for c in compared.comparisons)
    values = {"unclear": unclear, "compared": len(compared.comparisons), "executions": executions}
    return Statement("some unclear" if unclear else "none unclear", values)


def _thread_gain(rows: pd.DataFrame) -> tuple[int, float, int] | None:
    """Return the most threads measured in decode, their speed-up over one, and the fewest threads within 5 % of the best time."""
    medians = comparison.execution_medians(rows[rows["phase"] == "decode"])
    sizes = [name for name in comparison.CASE if name != "threads"]
    for _, case in medians.groupby(sizes, sort=False):
        times = case.groupby("threads")["seconds"].median()
        if len(times) > 1:
            enough = int(times[times <= 1.05 * times.min()].index.min())
            return int(times.index.max()), float(times.iloc[0] / times.iloc[-1]), enough
    return None


def _batch_gain(rows: pd.DataFrame) -> tuple[int, float] | None:
    """Return the largest batch measured in decode, and its tokens per second over those of a batch of one."""
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
