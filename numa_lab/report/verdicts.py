"""What the numbers of a run say, in sentences and commands that are computed from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from numa_lab.bandwidth.node_bandwidths import Matrix, NodeProbes
from numa_lab.machine.shell_commands import to_paste
from numa_lab.measurement import comparison
from numa_lab.measurement.labels import AA_SUFFIX, is_local
from numa_lab.measurement.machine_facts import Machine
from numa_lab.measurement.pairwise import Comparison, Comparisons
from numa_lab.measurement.significance import MIN_EXECUTIONS
from numa_lab.placement.binding import Binding
from numa_lab.placement.numactl import cpu_options
from numa_lab.placement.receipt import least_huge_pages

_EMULATED = "This machine is emulated: its times mean nothing, its placement does. "
_UNSETTLED_IQR = 0.10
_DRIFT = 0.5  # lag-1 autocorrelation beyond which the run order shows


def headline(rows: pd.DataFrame, machine: Machine, compared: Comparisons) -> str:
    """Return the verdict of a run in one line."""
    warning = _EMULATED if machine.topology.emulated else ""
    labels, limit = bindings(rows), limit_sentence(rows)
    if not compared.comparisons:
        return f"{warning}{_nothing_to_compare(labels, machine.topology.effective_nodes)} {limit}"
    claims = [c for c in compared.comparisons if c.verdict in ("slower", "faster")]
    if not claims:
        return f"{warning}{_no_claim(compared)} {limit}"
    worst = max(claims, key=lambda c: abs(math.log(c.ratio)))
    slow, fast, ratio, low, high = worst.slower_first()
    return (
        f"{warning}{slow} takes {ratio:.2f} times as long as {fast} [{low:.2f}, {high:.2f}] in "
        f"{_case(worst.case)}: {len(claims)} of {len(compared.comparisons)} comparisons show a difference above the "
        f"noise floor ({_percent(compared.noise_floor)})."
    )


def _nothing_to_compare(labels: list[str], nodes: Sequence[int]) -> str:
    if len(labels) > 1:
        return f"Nothing to compare: {', '.join(labels)} have no case in common, since their thread counts differ."
    if len(nodes) > 1:
        return f"One binding ({labels[0]}) on {len(nodes)} nodes: nothing to compare."
    return f"One node: nothing to compare ({labels[0]})."


def _no_claim(compared: Comparisons) -> str:
    verdicts = [c.verdict for c in compared.comparisons]
    if verdicts and all(verdict == "same" for verdict in verdicts):
        return f"No difference between bindings above the noise floor ({_percent(compared.noise_floor)})."
    if math.isnan(compared.noise_floor):
        return "No difference between bindings can be claimed: the run has no A/A pair, so its noise floor is unknown."
    return (
        f"No difference between bindings could be shown: {verdicts.count('same')} comparisons are ties and "
        f"{verdicts.count('unclear')} unclear at a noise floor of {_percent(compared.noise_floor)}; "
        "more executions would tell."
    )


def limit_sentence(rows: pd.DataFrame) -> str:
    """Return a sentence on the share of the memory read limit that decode reaches, at its best and its worst kind and dtype."""
    kinds = _limit_shares(rows)
    if kinds.empty:
        return "No decode was measured, so nothing is said of the memory limit."
    best, worst = kinds.idxmax(), kinds.idxmin()
    return (
        f"Decode reaches {kinds.max():.0%} of the memory read limit at best ({_kind(best)}) "
        f"and {kinds.min():.0%} at worst ({_kind(worst)})."
    )


def limit_shares(rows: pd.DataFrame) -> tuple[float, float] | None:
    """Lowest and highest share of the memory read limit that a kind of decode reaches; None where none was measured."""
    kinds = _limit_shares(rows)
    return None if kinds.empty else (float(kinds.min()), float(kinds.max()))


def _limit_shares(rows: pd.DataFrame) -> pd.Series[float]:
    decode = rows[(rows["phase"] == "decode") & ~rows["cold"]]
    shares = decode["kv_bytes"] / decode["seconds"] / decode["limit_bytes_per_s"]
    return decode.assign(share=shares).groupby(["attention", "dtype", "backend"])["share"].median()


def placement_sentence(rows: pd.DataFrame) -> str:
    """Return a sentence on where pages lay and threads ran, over all rows."""
    share, cpus = rows["local_page_share"], sorted(set(rows["observed_cpus"]))
    where = f"all pages were local to the CPUs that computed ({', '.join(cpus)})"
    if (share < 1).any():
        where = (
            f"between {share.min():.0%} and {share.max():.0%} of the pages were local to the CPUs ({', '.join(cpus)})"
        )
    huge = least_huge_pages(rows["observed"])
    on_huge = "" if math.isnan(huge) else f" K and V lay on huge pages, {huge:.0%} of them at least."
    return f"In {rows['execution_id'].nunique()} execution(s), {where}.{on_huge}"


def cold_sentence(rows: pd.DataFrame) -> str:
    """Return a sentence on how much longer the first call takes than the steady state."""
    keys = ["execution_id", *comparison.CASE]
    cold = rows[rows["cold"]].groupby(keys)["seconds"].first()
    steady = rows[~rows["cold"]].groupby(keys)["seconds"].median()
    ratio = (cold / steady).dropna()
    if ratio.empty:
        return "No case has both a first call and steady samples."
    return (
        f"The first call takes {ratio.median():.1f} times as long as the steady state in the median over cases, "
        f"{ratio.max():.1f} times at most."
    )


def noise_sentence(rows: pd.DataFrame, compared: Comparisons) -> str:
    """Return a sentence on the noise floor, the drift over the run order, and whether more executions are needed."""
    order = comparison.run_order(rows)
    drift = comparison.lag1_autocorrelation(order["relative"].tolist())
    floor = (
        "There is no A/A pair, so no difference can be claimed"
        if math.isnan(compared.noise_floor)
        else f"In nine tenths of the cases one binding differs from itself by less than {_percent(compared.noise_floor)}, "
        "which is the noise floor"
    )
    runs = "too few to see a drift" if math.isnan(drift) else f"their lag-1 autocorrelation is {drift:.2f}"
    return f"{floor}; {len(order)} executions, {runs}. {' '.join(instability(rows)) or 'Nothing looks unstable.'}"


def instability(rows: pd.DataFrame) -> list[str]:
    """Return what makes the results doubtful and what to do about it, as sentences; empty where nothing does."""
    doubts = []
    medians = comparison.execution_medians(rows)
    quartiles = (
        rows[~rows["cold"]].groupby(["execution_id", *comparison.CASE])["seconds"].quantile([0.25, 0.5, 0.75]).unstack()
    )
    wide = ((quartiles[0.75] - quartiles[0.25]) / quartiles[0.5] > _UNSETTLED_IQR).mean()
    if wide > 0.25:
        doubts.append(
            f"In {wide:.0%} of the cases the middle half of the samples spans more than {_UNSETTLED_IQR:.0%}: "
            f"something else runs on this machine; stop it, or run `{to_paste('numa-lab', 'doctor')}`."
        )
    few = medians.groupby("label")["execution_id"].nunique().min()
    if few < MIN_EXECUTIONS + 2:
        doubts.append(
            f"{few} execution(s) per binding can't show a small effect: "
            f"run `{to_paste('numa-lab', 'sweep', '--profile', 'standard')}`."
        )
    drift = comparison.lag1_autocorrelation(comparison.run_order(rows)["relative"].tolist())
    if abs(drift) > _DRIFT:
        doubts.append(
            f"The times follow the run order (lag-1 autocorrelation {drift:.2f}): the machine was changing; repeat it."
        )
    return doubts


def commands(rows: pd.DataFrame, machine: Machine, compared: Comparisons) -> list[tuple[str, str]]:
    """Return what to type on this machine, as pairs of a purpose and a command."""
    local = [label for label in bindings(rows) if is_local(label)]
    nodes = [Binding.parse(label).cpu_nodes[0] for label in local] or list(machine.topology.allowed_nodes)
    best = best_node(compared)
    chosen = best if best is not None else next((n for n in nodes if n not in slow_nodes(compared)), nodes[0])
    program, cpus = "python your_program.py", _cpus_of(chosen, machine)
    purposes = [
        ("Run on one node, with memory of that node only", f"numactl {cpus} --membind={chosen} {program}"),
        ("The same, but let memory overflow to other nodes", f"numactl {cpus} --preferred={chosen} {program}"),
        ("Bind the CPUs only; memory follows the first touch", f"numactl {cpus} {program}"),
    ]
    if len(nodes) > 1:
        purposes.append(
            (
                "One process per node, for batches and long-running services",
                " & ".join(f"numactl {_cpus_of(node, machine)} --membind={node} {program}" for node in nodes),
            )
        )
    return purposes


def _cpus_of(node: int, machine: Machine) -> str:
    """Return what to tell numactl so that a program runs on a node, within the CPUs that the run was allowed to use."""
    topology = machine.topology
    return " ".join(cpu_options([node], topology.node_cpus, topology.cpus_of([node])))


def best_node(compared: Comparisons) -> int | None:
    """Return the node that is faster than each other local one in some case and slower in none; None where no node is."""
    beaten = _beaten(compared)
    losers = set().union(*beaten.values())
    best = [node for node in beaten.keys() - losers if beaten[node] == beaten.keys() - {node}]
    return best[0] if best else None


def slow_nodes(compared: Comparisons) -> list[int]:
    """Nodes that are slower than another local one in some case and faster in none."""
    beaten = _beaten(compared)
    losers = set().union(*beaten.values())
    return sorted(node for node in losers if not beaten[node])


def _beaten(compared: Comparisons) -> dict[int, set[int]]:
    """For each node the nodes than which it was shown to be faster, each with its own memory."""
    found: dict[int, set[int]] = {}
    for c in _between_local(compared):
        slow, fast = (Binding.parse(label).cpu_nodes[0] for label in c.slower_first()[:2])
        found.setdefault(slow, set())
        found.setdefault(fast, set()).update({slow} if c.verdict in ("slower", "faster") else ())
    return found


def nodes_tie(compared: Comparisons) -> bool:
    """Return whether the local bindings were shown to be the same in every case, which is more than that none was shown to differ."""
    verdicts = {c.verdict for c in _between_local(compared)}
    return verdicts == {"same"}


def nodes_differ(compared: Comparisons) -> bool:
    """Return whether two local bindings differ in some case."""
    return any(c.verdict in ("slower", "faster") for c in _between_local(compared))


def _between_local(compared: Comparisons) -> list[Comparison]:
    return [c for c in compared.comparisons if is_local(c.a) and is_local(c.b)]


def bandwidth_sentence(probes: NodeProbes) -> str:
    """Return a sentence on how fast nodes read their own memory, and how much slower that of another node."""
    return _matrix_sentence(probes.nodes, probes.read_bytes_per_s, "reads its own memory at", 1e-9, "GB/s")


def latency_sentence(probes: NodeProbes) -> str:
    """Return a sentence on how long a load from a node's own memory takes, and from that of another node."""
    return _matrix_sentence(probes.nodes, probes.latency_ns, "waits for its own memory for", 1.0, "ns")


def _matrix_sentence(nodes: Sequence[int], matrix: Matrix, verb: str, scale: float, unit: str) -> str:
    cells = {
        (cpu, mem): value * scale
        for cpu, row in zip(nodes, matrix, strict=True)
        for mem, value in zip(nodes, row, strict=True)
        if value is not None
    }
    local = {cpu: value for (cpu, mem), value in cells.items() if cpu == mem}
    remote = {pair: value / local[pair[0]] for pair, value in cells.items() if pair[0] != pair[1] and pair[0] in local}
    if not local:
        return "No node could reach memory of its own."
    low, high = min(local.values()), max(local.values())
    each = f"{low:.1f} {unit}" if len(local) == 1 else f"{low:.1f} to {high:.1f} {unit}"
    own_memory = f"Each of {len(local)} node(s) {verb} {each}; "
    if not remote:
        return own_memory + "there is no other node's memory to compare with."
    return (
        own_memory
        + f"memory of another node gives {min(remote.values()):.2f} to {max(remote.values()):.2f} times that."
    )


def bindings(rows: pd.DataFrame) -> list[str]:
    """Return labels of a run without that of the A/A twin."""
    return sorted(label for label in set(rows["label"]) if not label.endswith(AA_SUFFIX))


def _case(case: Mapping[str, Any]) -> str:
    return f"{str(case['attention']).upper()} {case['phase']}, {case['dtype']}, {case['kv_len']} tokens"


def _kind(key: Any) -> str:
    attention, dtype, backend = key
    return f"{str(attention).upper()}, {dtype}, {backend}"


def _percent(share: float) -> str:
    return "unknown" if math.isnan(share) else f"{share:.1%}"
