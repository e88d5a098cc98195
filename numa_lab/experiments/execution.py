"""One execution: what a measured notebook calls.

``start`` asks the kernel what was granted, ``Execution.measure`` times every case beside its memory limit and takes the
receipt of each, ``Execution.finish`` writes the rows and refuses those that can't be trusted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from numa_lab.attention import decode, gqa
from numa_lab.attention.backend_names import require_backend
from numa_lab.attention.reference import attention as reference
from numa_lab.bandwidth.read_probe import read_bandwidth
from numa_lab.errors import InvalidInput, NodeUnavailable, UntrustedResult
from numa_lab.machine.control_groups import tightest
from numa_lab.machine.shell_commands import to_paste
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology, spread
from numa_lab.machine.topology_reader import read_topology
from numa_lab.measurement.case_timing import BY_HAND, KVPool, noise, pool_bytes, sample_case
from numa_lab.measurement.machine_facts import describe_machine
from numa_lab.measurement.receipts import contradictions
from numa_lab.measurement.results import write_rows
from numa_lab.measurement.workloads import MEMORY_SHARE, Case, Workload, usable_bytes, workload
from numa_lab.placement import openmp, page_location, pinned_team
from numa_lab.placement.binding import Binding, MemPolicy, effective

LIMIT_SECONDS = 0.1  # of one reading, of which each case has two
TOLERANCE = {
    "float32": 1e-5,
    "bfloat16": 2e-2,
    "float16": 2e-3,
}  # of outputs of size about 1: a few units in the last place


def start(
    *,
    profile: str,
    preset: str,
    kv_len: int = 0,
    batch: int = 0,
    backend: str = "auto",
    execution: Mapping[str, Any] | None = None,
) -> Execution:
    """Check the parameters of a measured notebook and look at what the kernel granted this process.

    Parameters
    ----------
    profile, preset, kv_len, batch
        As ``numa_lab.measurement.workloads.workload`` takes them.
    backend
        A backend of ``gqa_attention``, or ``auto``.
    execution
        What the sweep says of this execution: run_id, execution_id, block, order, label, binding and the path of the
        result. Without it the binding is whatever numactl set, and nothing is written.

    Raises
    ------
    InvalidInput
        A parameter makes no sense.
    """
    require_backend(backend)
    identity = dict(execution or {})
    unknown = set(identity) - {*BY_HAND, "label", "binding", "result"}
    if unknown:
        raise InvalidInput(f"execution={identity}: unknown {sorted(unknown)}; leave it empty outside a sweep")
    if no_texts := [name for name in ("label", "binding", "result") if not isinstance(identity.get(name, ""), str)]:
        raise InvalidInput(
            f"execution={identity}: expected a text for {', '.join(no_texts)}; leave it empty outside a sweep"
        )
    topology = read_topology()
    granted = effective(topology)
    requested = Binding.parse(identity["binding"]) if "binding" in identity else granted
    chosen = workload(profile, preset, kv_len, batch, memory_bytes=usable_bytes(topology, requested))
    return Execution(topology, requested, granted, chosen, backend, identity)


@dataclass(frozen=True)
class Execution:
    """One process that measures: who asked for it, and what the kernel granted it."""

    topology: Topology
    requested: Binding
    effective: Binding
    workload: Workload
    backend: str
    identity: Mapping[str, Any]

    @property
    def cores(self) -> tuple[int, ...]:
        """One CPU of each physical core that the kernel granted."""
        return self.topology.physical_cores(sorted(os.sched_getaffinity(0)))

    @property
    def label(self) -> str:
        """The binding's label, or that of the plan."""
        return str(self.identity.get("label", self.requested))

    def describe(self) -> pd.DataFrame:
        """Machine, binding and cost, to be shown before anything is measured."""
        cases, library = self.workload.cases(len(self.cores)), openmp.runtime()
        facts = {
            "machine": self.topology.model_name,
            "label": self.label,
            "requested": str(self.requested),
            "effective": str(self.effective),
            "allowed CPUs": format_cpulist(os.sched_getaffinity(0)),
            "computing threads": f"up to {len(self.cores)}, one per physical core",
            "OpenMP": library.description if library else "torch's library was not found",
            "pages seen by": page_location.locator(),
            "cases": f"{len(cases)}, about {len(cases) * self.workload.profile.case_seconds * 1.5:.0f} s",
            "scaled": self.workload.message or "no",
        }
        return pd.DataFrame({"value": facts})

    def pool(self) -> KVPool:
        """Memory for K and V; under first touch filled by one thread on a CPU of the binding's memory node.

        Raises
        ------
        NodeUnavailable
            The memory nodes have too little free memory, or this process has no CPU to touch it first from.
        """
        nbytes = self._pool_bytes()
        if self.requested.policy is not MemPolicy.FIRST_TOUCH:
            return KVPool(nbytes)
        self.requested.require(self.topology)
        with pinned_team.pinned_team(self.topology.cpus_for(self.requested.mem_nodes, 1)):
            return KVPool(nbytes)

    def measure(self) -> pd.DataFrame:
        """Time every case of the workload; tidy rows (``numa_lab.measurement.results.COLUMNS``), one per sample.

        Raises
        ------
        NodeUnavailable
            As ``pool`` says.
        """
        cores, calls = self.cores, self._calls()  # asked before the team is pinned, which changes the answer
        pool = self.pool()
        rows: list[dict[str, object]] = []
        for threads in sorted({case.threads for case, _ in calls}):
            with pinned_team.pinned_team(spread(cores, threads)):
                before = read_bandwidth(pool.buffer, threads, seconds=LIMIT_SECONDS)
                for case, backend in calls:
                    if case.threads != threads:
                        continue
                    sampled = sample_case(
                        case,
                        pool,
                        requested=self.requested,
                        granted=self.effective,
                        topology=self.topology,
                        backend=backend,
                        seconds=self.workload.profile.case_seconds,
                        identity={**self.identity, "label": self.label},
                    )
                    # Before and after: on a shared machine what memory gives can change within seconds.
                    after = read_bandwidth(pool.buffer, threads, seconds=LIMIT_SECONDS)
                    rows += [{**row, "limit_bytes_per_s": (before + after) / 2} for row in sampled]
                    before = after
        return pd.DataFrame(rows)

    def _calls(self) -> list[tuple[Case, str]]:
        """Return each case and what computes it; one also by torch, to show what a slow kernel hides."""
        cases = self.workload.cases(len(self.cores))
        calls = [(case, self.backend) for case in cases]
        if self.backend == "auto" and not decode.unavailable():
            base = self.workload.base.replace(dtype=self.workload.profile.dtypes[0])
            calls += [(case, "torch") for case in cases if case == Case(base, cases[0].threads)]
        return calls

    def finish(self, rows: pd.DataFrame) -> str:
        """Write the rows where the sweep asked for them, then refuse those that can't be trusted.

        Raises
        ------
        UntrustedResult
            A receipt contradicts the binding, or a backend is wrong against the float64 reference.
        """
        wrong = [*contradictions(rows, self.topology.allowed_node_cpus), *_wrong_backends(rows)]
        if result := self.identity.get("result"):
            write_rows(Path(result), rows, describe_machine(self.topology).fingerprint)
        if wrong:
            raise UntrustedResult(" ".join(wrong))
        return f"{len(rows)} rows: no receipt contradicts {self.requested}, and every backend agrees with float64."

    def _pool_bytes(self) -> int:
        """Room for K and V: the largest case, and more than the caches hold where memory allows it."""
        largest = self.workload.largest_kv_bytes
        wanted = pool_bytes(self.topology, self.cores, largest)
        if self.requested.policy is MemPolicy.FIRST_TOUCH:
            nodes = self.requested.mem_nodes
            free, what = self.topology.free_bytes(nodes), "free"
            why = "without a policy the kernel takes that of other nodes before it drops file cache"
        else:
            nodes = self.effective.mem_nodes or self.topology.allowed_nodes
            free, what = self.topology.available_bytes(nodes), "available"
            why = "a bound process that runs out of it is killed"
        limit = tightest(self.topology.memory_limits)
        if limit and largest > limit.available_bytes:
            raise NodeUnavailable(
                f"{limit.sentence()}, and K and V need {largest / 2**20:,.0f} MiB: take a smaller kv_len or batch, or raise the "
                f"limit as `{to_paste('numa-lab', 'doctor')}` says"
            )
        if largest > free:
            raise NodeUnavailable(
                f"nodes {format_cpulist(nodes)} have {free / 2**20:,.0f} MiB {what} and K and V need "
                f"{largest / 2**20:,.0f} MiB: take a smaller kv_len or batch, or free memory ({why})"
            )
        return max(largest, min(wanted, int(MEMORY_SHARE * free)))


def _wrong_backends(rows: pd.DataFrame) -> list[str]:
    """Return a sentence for each kind of case whose backend is further from float64 than its dtype explains."""
    wrong = []
    kinds = rows[["backend", "phase", "dtype", "q_heads", "kv_heads", "head_dim"]].drop_duplicates()
    for backend, phase, dtype, q_heads, kv_heads, head_dim in kinds.itertuples(index=False):
        query = noise(getattr(torch, dtype), q_heads * 16 * head_dim).view(1, q_heads, 16, head_dim)
        key, value = (noise(query.dtype, 2 * kv_heads * 16 * head_dim).view(2, 1, kv_heads, 16, head_dim)).unbind()
        if phase == "decode":
            query = query[:, :, :1]
        options: dict[str, Any] = {"is_causal": phase == "prefill", "enable_gqa": kv_heads < q_heads}
        expected, _ = reference(query, key, value, **options)
        error = (gqa.gqa_attention(query, key, value, **options, backend=backend) - expected).abs().max().item()
        if not error <= TOLERANCE[dtype]:
            wrong.append(
                f"{backend} in {dtype}, {phase}, {q_heads}/{kv_heads} heads: off by {error:.2g} from float64, "
                f"expected at most {TOLERANCE[dtype]}."
            )
    return wrong
