"""Going on with a sweep that was begun: only on the same machine, with the same CPUs and nodes of it, and the same notebook."""

from __future__ import annotations

from pathlib import Path

from numa_lab.errors import MachineMismatch, RunDirectoryError
from numa_lab.experiments import notebook_runner
from numa_lab.experiments.sweep_plan import SweepPlan
from numa_lab.machine.shell_commands import to_paste
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology
from numa_lab.measurement.machine_facts import describe_machine, load_machine
from numa_lab.placement.numactl import taskset_words


def check_resumable(plan: SweepPlan, run_dir: Path, topology: Topology, measured: Path) -> None:
    """Refuse to finish a run on another machine, with other CPUs or nodes of it, or with another notebook than it began.

    Raises
    ------
    MachineMismatch
        Naming the values that differ.
    RunDirectoryError
        The notebook has changed.
    """
    begun = load_machine(run_dir)
    differing = begun.differences(describe_machine(topology))
    if differing:
        raise MachineMismatch(f"{run_dir} was begun on another machine: {'; '.join(differing)}. Start a new sweep here")
    if other := _other_share(begun.topology, topology, run_dir):
        raise MachineMismatch(f"{run_dir} was begun {other}, or start a new sweep")
    if notebook_runner.digest(measured) != plan.notebook_sha256:
        raise RunDirectoryError(
            f"{measured.name} has changed since {run_dir} was begun: start a new sweep, or restore the notebook"
        )


def _other_share(begun: Topology, topology: Topology, run_dir: Path) -> str:
    """Return what this process may use that the one that began might not, or the reverse, and how to go on; empty where both are alike."""
    cpus, now = set(begun.allowed_cpus), set(topology.allowed_cpus)
    if cpus != now:
        again = f"type `{to_paste('taskset', '-c', format_cpulist(cpus), 'numa-lab', 'sweep', '--resume', run_dir)}`"
        return (
            f"on CPUs {format_cpulist(cpus)}, and this process may use {format_cpulist(now)}: that would be another "
            f"measurement. To go on {again if cpus < now else 'let it use the same (taskset, cpuset)'}"
        )
    nodes, now = set(begun.allowed_nodes), set(topology.allowed_nodes)
    if nodes != now:
        return (
            f"with memory of nodes {format_cpulist(nodes)}, and this process may use that of {format_cpulist(now)}: that "
            "would be another measurement. To go on let it use the same (cpuset)"
        )
    return ""


def resume_command(run_dir: Path, topology: Topology) -> str:
    """Return what to type to run what is missing in a run directory."""
    return to_paste(*taskset_words(topology), "numa-lab", "sweep", "--resume", run_dir)
