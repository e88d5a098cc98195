"""The source guide's analysis: attention on each node, over batches and threads, and across nodes."""

import argparse
from pathlib import Path

from numa_lab.errors import run_script
from numa_lab.machine.shell_commands import to_paste
from numa_lab.measurement.atomic_files import write_json


def main() -> None:
    """Run the four analyses and write numa_attention_results.json."""
    from tqdm import tqdm

    from numa_lab.experiments import guide_analyses

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the guide's batch of 512, as far as memory allows")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="for all visits, of which each has three (default 30)"
    )
    parser.add_argument("--out", type=Path, default=Path("data/numa_attention_results.json"), help="where to write")
    options = parser.parse_args()

    topology, shape, message = guide_analyses.this_machine(full=options.full)
    print(f"{topology.model_name}: nodes {list(topology.effective_nodes)}; batch {shape.batch}, kv_len {shape.kv_len}.")
    if message:
        print(message)
    todo = guide_analyses.cells(topology, shape)
    with tqdm(total=0, unit="visit", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        rows = guide_analyses.measure(topology, todo, seconds=options.seconds, progress=progress)
    found = guide_analyses.results(topology, rows, message)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, found)
    for name in ("gqa", "std"):
        print(guide_analyses.spread_sentence(found, name))
    if found["spread_gqa_percent"] is not None:
        print(f"A spread alone is no proof: `{to_paste('numa-lab', 'detect')}` says whether nodes differ, or tie.")
    problems = found["receipts"]["contradictions"]
    print("\n".join(problems) or f"No receipt of {rows['execution_id'].nunique()} visits contradicts its binding.")
    print(f"Written: {options.out}")


if __name__ == "__main__":
    run_script(main)
