"""Machines with hundreds of CPUs and 16 nodes and more: everything stays right, and quick enough to wait for.

Limits are CPU time, five times and more what it takes alone, so that other work on the machine does not matter; what grows with the
square of the machine takes hours.
"""

import os
import time

import pytest

from numa_lab.attention.shapes import preset
from numa_lab.bandwidth import advisor
from numa_lab.bandwidth.node_bandwidths import NodeBandwidths
from numa_lab.experiments import notebook_files, sweep_bindings, sweep_plan
from numa_lab.machine.overview import overview
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology_reader import read_topology
from numa_lab.measurement import comparison
from numa_lab.measurement.machine_facts import load_machine
from numa_lab.measurement.receipts import contradictions
from numa_lab.measurement.results import load_run
from numa_lab.placement.binding import Binding
from numa_lab.report import figures, verdicts

MEASURED = notebook_files.find("02_attention_under_binding")
SECONDS = 2  # of CPU time, for topology and plan together


@pytest.mark.parametrize(("name", "bindings"), [("128ia64-17n4s2c", 16 * 17), ("256ppc-8n8s4t", 8 * 8)])
def test_a_large_machine_is_read_and_planned(captured, name, bindings):
    root = captured(name)
    begin = time.process_time()
    topology = read_topology(root)
    chosen = sweep_bindings.choose_bindings("matrix", topology)
    made = sweep_plan.make_plan(
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


NODES, CPUS = 72, 4608


@pytest.fixture
def largest(tmp_path):
    """So many nodes with two threads on each core; each core has a cache, and each node another."""
    half = CPUS // 2

    def write(folder, **files):
        os.makedirs(tmp_path / folder, exist_ok=True)
        for name, text in files.items():
            with open(tmp_path / folder / name, "w") as file:
                file.write(text)

    write("proc/self", status=f"Cpus_allowed_list:\t0-{CPUS - 1}\nMems_allowed_list:\t0-{NODES - 1}\n")
    write("proc", cpuinfo="model name\t: The largest\n")
    write("sys/devices/system/cpu", online=f"0-{CPUS - 1}\n")
    of_node = [f"{32 * n}-{32 * n + 31},{half + 32 * n}-{half + 32 * n + 31}" for n in range(NODES)]
    for node, cpus in enumerate(of_node):
        distances = " ".join("10" if node == other else "32" for other in range(NODES))
        memory = f"Node {node} MemTotal: 260000000 kB\nNode {node} MemFree: 250000000 kB\n"
        write(f"sys/devices/system/node/node{node}", cpulist=cpus, distance=distances, meminfo=memory)
    for cpu in range(CPUS):
        core, node, folder = cpu % half, cpu % half // 32, f"sys/devices/system/cpu/cpu{cpu}"
        siblings = f"{core},{core + half}"
        write(f"{folder}/topology", thread_siblings_list=siblings, physical_package_id=f"{node // 2}")
        write(f"{folder}/cache/index0", level="2", type="Unified", size="1024K", shared_cpu_list=siblings)
        write(f"{folder}/cache/index1", level="3", type="Unified", size="32768K", shared_cpu_list=of_node[node])
    return tmp_path


def test_72_nodes_with_4608_cpus_are_read_and_planned(largest, monkeypatch):
    opened, really = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or really(path, *rest))
    begin = time.process_time()
    topology = read_topology(largest)
    text = overview(topology)
    read = time.process_time() - begin
    assert len(opened) < 6 * CPUS, "a file for each CPU and cache, and none twice"
    assert (len(topology.cpus), len(topology.sockets), topology.last_cache_bytes) == (CPUS, 36, NODES * 32 << 20)
    assert topology.cpus_for([71]) == tuple(range(71 * 32, 72 * 32))
    assert f"\n  71  248.0 GiB  238.4 GiB  yes            {format_cpulist(topology.node_cpus[71])}\n" in text
    chosen = sweep_bindings.choose_bindings("matrix", topology)
    made = sweep_plan.make_plan(
        profile="quick", bindings=chosen, topology=topology, measured=MEASURED, parameters={}, run_id="x", command=""
    )
    planned = time.process_time() - begin - read
    assert len(made.executions) == 5 * (NODES * NODES + 1)
    rows = tuple(tuple(9e10 if cpu == mem else 2e10 + cpu for mem in range(NODES)) for cpu in range(NODES))
    measured = NodeBandwidths(topology.node_ids, rows, None, None)
    shape = preset("llama-3-8b")
    predicted = advisor.predict_bindings([(binding, shape) for binding in chosen for _ in range(9)], topology, measured)
    assert predicted[0].limit == "memory of node 0, 90.0 GB/s"
    assert read < 4
    assert planned < 15
    assert time.process_time() - begin - read - planned < 15, "as many predictions as a profile has decode cases"


def test_a_run_on_16_nodes_is_judged_and_drawn(synthetic_rows, synthetic_run):
    labels = [f"c{cpu}m{mem}" for cpu in range(16) for mem in range(16) if cpu in (mem, 0)]
    remote = {label: 1.3 for label in labels if Binding.parse(label).cpu_nodes != Binding.parse(label).mem_nodes}
    run_dir = synthetic_run(synthetic_rows(labels, executions=3, effects=remote, samples=3, nodes=16), nodes=16)
    rows, machine = load_run(run_dir), load_machine(run_dir)
    assert contradictions(rows, machine.topology.allowed_node_cpus) == []
    heatmap = figures.overhead_heatmap(rows)
    assert len(heatmap.table) >= len(labels)
    assert heatmap.png()
    compared = comparison.compare(rows)
    assert "takes 1.3" in verdicts.headline(rows, machine, compared)
