"""What computes works where none of the laboratory's packages is installed."""

import subprocess
import sys
import textwrap

import pytest

LABORATORY = (
    "IPython", "ipykernel", "jinja2", "jupyterlab", "markupsafe", "matplotlib", "nbconvert", "nbformat", "pandas",
    "papermill", "PIL", "cycler", "pyarrow", "scipy", "seaborn", "tqdm", "yaml",
)  # fmt: skip
TABLES = ("load_run", "load_runs", "rank_nodes")  # which return a DataFrame


def test_public_names_need_no_package_of_the_laboratory():
    script = f"""
        import sys

        sys.modules |= dict.fromkeys({LABORATORY})  # None: an import of it fails as where it is not installed

        import numa_lab

        for name in set(numa_lab.__all__) - set({TABLES}):
            getattr(numa_lab, name)

        import torch
        from numa_lab.attention.shapes import preset
        from numa_lab.measurement.significance import ratio_of_medians
        from numa_lab.nodes.node_visits import visit_nodes
        from numa_lab.nodes import optimal_node

        topology = numa_lab.read_topology()
        assert numa_lab.get_optimal_numa_node() in topology.effective_nodes
        # With a single node it compares nothing.
        visits = visit_nodes(topology, preset("llama-3-8b", kv_len=64), seconds=0.001)
        assert optimal_node.rank_visits(visits, topology).noise_floor >= 0
        assert ratio_of_medians([1.0, 1.01, 0.99], [2.0, 2.02, 1.98]).high < 1
        with numa_lab.NUMAThreadPool() as pool:
            query, keys = torch.ones(1, 4, 1, 64), torch.ones(1, 2, 16, 64)
            (output,) = pool.parallel_gqa_compute([query], [keys], [keys])
        assert torch.allclose(output, query)
        """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script)], check=True, timeout=120)


@pytest.mark.parametrize(
    "words",
    [
        ["sweep", "--dry-run"],
        ["report", "data/sample"],
        ["verdict", "data/sample"],
        ["load_run"],
        ["analyze_numa_cpu_attention"],
        ["optimize_gqa_with_numa"],
    ],
)
def test_what_needs_the_laboratory_says_how_to_install_it(words):
    script = f"""
        import sys

        sys.modules |= dict.fromkeys({LABORATORY})
        if {words} == ["load_run"]:
            try:
                from numa_lab import load_run
            except ImportError as error:
                sys.exit(str(error))
        if {words}[0].endswith(("_numa", "_attention")):
            import runpy

            sys.argv[1:] = []
            runpy.run_module({words}[0], run_name="__main__")
        from numa_lab.cli import main

        main({words})
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "is not installed" in done.stderr
    assert "pip install 'numa_lab[lab]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "words", [["topology"], ["doctor"], ["predict", "--machine", "icelake"], ["predict", "--run", "data/sample"]]
)
def test_commands_that_look_and_predict_need_no_laboratory(words):
    script = f"import sys; sys.modules |= dict.fromkeys({LABORATORY}); from numa_lab.cli import main; main({words})"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, stdout=subprocess.DEVNULL)
