"""Machines with hundreds of CPUs and 16 nodes and more: everything stays right, and quick enough to wait for."""

import time

import pytest

from numa_lab import notebook, plan, receipt, stats
from numa_lab.binding import Binding
from numa_lab.report import figures, verdicts
from numa_lab.results import load_machine, load_run
from numa_lab.topology import read_topology

MEASURED = notebook.find("02_attention_under_binding")
SECONDS = 2  # of CPU time, for topology and plan together


@pytest.mark.parametrize(("name", "bindings"), [("128ia64-17n4s2c", 16 * 17), ("256ppc-8n8s4t", 8 * 8)])
def test_a_large_machine_is_read_and_planned(captured, name, bindings):
    root = captured(name)
    begin = time.process_time()
    topology = read_topology(root)
    chosen = plan.choose_bindings("matrix", topology)
    made = plan.make_plan(
        profile="quick",
        bindings=chosen,
        topology=topology,
        measured=MEASURED,
        parameters={},
        run_id="large",
        command="",
    )
    seconds = time.process_time() - begin
    assert len(chosen) == bindings
    assert len(made.executions) == 5 * (bindings + 1)
    assert len({planned.execution_id for planned in made.executions}) == len(made.executions)
    assert {cpu for node in topology.nodes for cpu in node.cpus} == {cpu.id for cpu in topology.cpus}
    assert seconds < SECONDS


def test_a_run_on_16_nodes_is_judged_and_drawn(synthetic_rows, synthetic_run):
    labels = [f"c{cpu}m{mem}" for cpu in range(16) for mem in range(16) if cpu in (mem, 0)]
    remote = {label: 1.3 for label in labels if Binding.parse(label).cpu_nodes != Binding.parse(label).mem_nodes}
    run_dir = synthetic_run(synthetic_rows(labels, executions=3, effects=remote, samples=3, nodes=16), nodes=16)
    rows, machine = load_run(run_dir), load_machine(run_dir)
    node_cpus = {node["id"]: node["cpus"] for node in machine["topology"]["nodes"]}
    assert receipt.contradictions(rows, node_cpus) == []
    heatmap = figures.overhead_heatmap(rows)
    assert len(heatmap.table) >= len(labels)
    assert heatmap.png()
    compared = stats.compare(rows)
    assert "takes 1.3" in verdicts.headline(rows, machine, compared)
