"""What a processor could do with the decode kernel at best, by a static model of its pipeline, for processors that are not at hand.

Each step of the kernel is compiled for the processor, and llvm-mca simulates its inner loop. So this is the code that would run there, and
not a sketch of it. The ceiling is modelled too: multiply-adds of the same kind that wait for nothing. Limits: all that is loaded lies in
the first-level cache, prefetches cost what other loads cost, and loops are those that run most, without what stands around them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pandas as pd
from numba import cfunc, types
from tqdm import tqdm

from numa_lab.attention import kernel_cache, vectors
from numa_lab.attention.decode_spec import Space
from numa_lab.attention.panel_steps import steps_of
from numa_lab.attention.panels import Panel
from numa_lab.attention.processors import processor
from numa_lab.attention.vectors import Kind, Rows, Vectors

X86, ARM = "x86_64-linux-gnu", "aarch64-linux-gnu"
# By LLVM's names: the vectors that the kernel would choose there.
PROCESSORS = {
    "znver2": vectors.AVX2,
    "znver3": vectors.AVX2,
    "znver4": vectors.AVX512_BF16,
    "skylake-avx512": vectors.AVX512,
    "icelake-server": vectors.AVX512,
    "sapphirerapids": vectors.AVX512,
    "neoverse-n1": vectors.NEON,
    "neoverse-v1": vectors.NEON,
    "tsv110": vectors.NEON,
}
KINDS = {"bfloat16": Kind.BFLOAT16, "float32": Kind.FLOAT32, "float16": Kind.FLOAT16}
GROUPS = (1, 4, 8, 16)
STEPS = ("scores", "softmax", "weighted sum")
HEAD_DIM = 128
TURNS = 100  # of a loop that is simulated

PAGE = Path(__file__).parents[1] / "docs" / "decode-kernel.md"
BEGIN, END = "<!-- made by make bench-model: begin -->", "<!-- made by make bench-model: end -->"

_LABEL = re.compile(r"^([.\w$]+):")
_JUMP = re.compile(r"^(?:j\w+|b\.\w+|b|cbn?z|tbn?z)\s+(?:.*,\s*)?(\.L[\w$]+)$")
_MULTIPLY_ADD = re.compile(r"^(?:vfn?m(?:add|sub)\w*p[sd]|vdpbf16ps|fml[as]|bfdot)\b")
_STACK = re.compile(r"\(%rsp|\[sp\b")


@dataclass(frozen=True)
class Step:
    """A step of the kernel by itself, as ``kernel_cache.assembly`` takes it; its loops can be told from those of others."""

    panel: Panel
    name: str

    def build(self) -> Any:
        """Compile a function that does this step over KV rows, whose number is not known: otherwise loops would be unrolled."""
        steps = steps_of(self.panel.rows, self.panel.height, Space.of(self.panel), ahead=True)
        score, soften, add_values, name, one = steps.score, steps.soften, steps.add_values, self.name, np.float32(1)

        @cfunc(types.void(*[types.int64] * 10), error_model="numpy")
        def step(count, query, rows, stride, following, following_stride, scores, state, sums, recent):  # type: ignore[no-untyped-def]
            if name == "scores":
                score(query, rows, stride, count, following, following_stride, scores, state)
            elif name == "softmax":
                soften(scores, count, one, state, sums, recent, 1)
            else:
                add_values(scores, rows, stride, count, following, following_stride, sums)

        return step


def loops(assembly: str) -> list[list[str]]:
    """The instructions of each loop that multiplies and adds, and that has no other such loop inside: from a label to a jump back to it."""
    lines: list[str] = []
    begin: dict[str, int] = {}
    spans = []
    for raw in assembly.splitlines():
        line = raw.split("//")[0].split("# ")[0].strip()
        if label := _LABEL.match(line):
            begin[label[1]] = len(lines)
        elif line and line[0] not in "#.":
            lines.append(line)
            if (jump := _JUMP.match(line)) and jump[1] in begin:
                spans.append((begin[jump[1]], len(lines)))
    spans = [span for span in spans if multiply_adds(lines[slice(*span)])]
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [lines[slice(*span)] for span in inner]


def multiply_adds(lines: Sequence[str]) -> int:
    """How many instructions multiply and add vectors."""
    return sum(bool(_MULTIPLY_ADD.match(line)) for line in lines)


@cache
def simulator() -> str:
    """The newest llvm-mca of this system."""
    found = [(number, path) for number in range(99, 13, -1) if (path := shutil.which(f"llvm-mca-{number}"))]
    path = found[0][1] if found else shutil.which("llvm-mca")
    if path is None:
        raise SystemExit("llvm-mca was not found: type: tools/need.sh llvm   # installs it, or names the package")
    return path


def simulate(lines: Sequence[str], triple: str, cpu: str) -> dict[str, Any]:
    """llvm-mca's account of so many turns of a loop."""
    done = subprocess.run(
        [simulator(), f"-mtriple={triple}", f"-mcpu={cpu}", f"-iterations={TURNS}", "-json", "-instruction-info", "-"],
        input="\n".join(line for line in lines if not _JUMP.match(line)) + "\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"llvm-mca does not know this code for {cpu}:\n{done.stderr[-2000:]}")
    region: dict[str, Any] = json.loads(done.stdout)["CodeRegions"][0]
    return region


def per_cycle(lines: Sequence[str], triple: str, cpu: str) -> float:
    """Multiply-adds per cycle."""
    return TURNS * multiply_adds(lines) / float(simulate(lines, triple, cpu)["SummaryView"]["TotalCycles"])


def independent(line: str, registers: int) -> list[str]:
    """As many multiply-adds of the same kind as there are registers but two, each of which adds to a register of its own."""
    name = line.split()[0]
    if width := re.search(r"%([xyz]mm)", line):
        factors = f"%{width[1]}{registers - 1}, %{width[1]}{registers - 2}"
        return [f"{name} {factors}, %{width[1]}{n}" for n in range(registers - 2)]
    return [f"{name} v{n}.4s, v31.4s, v30.4s" for n in range(registers - 2)]


def row_of(cpu: str, kind: str, group: int, step: str) -> dict[str, Any]:
    """What the model says of one step."""
    own: Vectors = replace(PROCESSORS[cpu], processor=processor(cpu))
    triple = ARM if PROCESSORS[cpu] is vectors.NEON else X86
    if triple == ARM:  # Numba compiles for this CPU too, which does not know that instruction
        own = replace(own, prefetch="")
    pairs = own.pairs and own.processor.pairs_first and kind == "bfloat16"
    panel = Panel(Rows(own, Kind.BFLOAT16_PAIRS if pairs else KINDS[kind], HEAD_DIM), group)
    target = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    loop = max(loops(kernel_cache.assembly(Step(panel, step), target)), key=multiply_adds)
    line = next(line for line in loop if _MULTIPLY_ADD.match(line))
    ceiling = per_cycle(independent(line, 16 if own.lanes == vectors.AVX2.lanes else 32), triple, cpu)
    region = simulate(loop, triple, cpu)
    cycles = float(region["SummaryView"]["TotalCycles"]) / TURNS
    # The last instruction is the jump, which is not simulated. To LLVM a prefetch both loads and stores; it takes the place of a load.
    moves = list(zip(loop, region["InstructionInfoView"]["InstructionList"], strict=False))
    return {
        "processor": cpu, "dtype": kind, "group": group, "step": step, "instructions": len(loop),
        "multiply_adds": multiply_adds(loop), "per_cycle": multiply_adds(loop) / cycles, "ceiling": ceiling,
        "share": multiply_adds(loop) / cycles / ceiling, "stack": sum(bool(_STACK.search(line)) for line in loop),
        "loads_per_cycle": sum(info["mayLoad"] for _, info in moves) / cycles,
        "stores_per_cycle": sum(info["mayStore"] and not line.startswith("pr") for line, info in moves) / cycles,
    }  # fmt: skip


def markdown(rows: pd.DataFrame) -> str:
    """The table of the page: shares of the ceiling of scores and weighted sum, and in brackets what goes to or from the stack."""
    shown = rows[rows["step"] != "softmax"]
    groups = sorted(shown["group"].unique())
    lines = [f"| | {' | '.join(f'group {group}' for group in groups)} |", "|---" * (len(groups) + 1) + "|"]
    for (cpu, dtype), some in shown.groupby(["processor", "dtype"], sort=False):
        cells = []
        for group in groups:
            steps = [
                some[(some["group"] == group) & (some["step"] == step)].iloc[0] for step in ("scores", "weighted sum")
            ]
            cells.append(
                ", ".join(f"{row['share']:.2f}" + (f" ({row['stack']})" if row["stack"] else "") for row in steps)
            )
        lines.append(f"| {cpu}, {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the model's account, and write it to the page of the kernel where that is asked for."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        "--processors", nargs="*", default=list(PROCESSORS), choices=list(PROCESSORS), help="by LLVM's names"
    )
    options.add_argument("--dtypes", nargs="*", default=list(KINDS), choices=list(KINDS))
    options.add_argument("--groups", nargs="*", type=int, default=GROUPS, choices=range(1, 17), metavar="1..16")
    options.add_argument("--write", action="store_true", help=f"put the table into docs/{PAGE.name}")
    chosen = options.parse_args()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    wanted = list(itertools.product(chosen.processors, chosen.dtypes, chosen.groups, STEPS))
    rows = pd.DataFrame([row_of(*one) for one in tqdm(wanted, mininterval=10)])
    version = subprocess.run([simulator(), "--version"], capture_output=True, text=True, check=True).stdout
    print(f"head_dim {HEAD_DIM}; {' '.join(version.split()[:4])}")
    print(rows.round(2).to_string(index=False))
    if chosen.write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{markdown(rows)}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
