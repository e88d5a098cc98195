"""What pages and docstrings show runs: each block of Python and of commands in Markdown, and every ``>>>``.

Commands are run by bash in a copy of the repository, where others stand in for those of the system: they call the real one,
with words added that make it small or keep it from changing this machine. A command that has no stand-in is not found,
and its block fails. What installs on a system is not called: the files that it is given have to exist.
"""

import doctest
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from sybil import Document, Region
from sybil.document import PythonDocStringDocument
from sybil.evaluators.doctest import DocTestEvaluator
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.abstract.doctest import DocTestStringParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from sybil.parsers.rest import DocTestParser

from numa_lab.cli import main
from numa_lab.experiments import notebook_files, notebook_runner, sweep, sweep_bindings, sweep_plan
from numa_lab.machine.topology_reader import read_topology

ROOT = Path(__file__).parents[1]
PAGES = [  # the source guide has tests of its own
    path
    for pattern in ("*.md", "*/*.md", "numa_lab/**/*.md", "tests/topologies/*.md", "notebooks/*.ipynb")
    for path in sorted(ROOT.glob(pattern))
]
MODULES = [
    path
    for pattern in ("*.py", "bench/*.py", "numa_lab/**/*.py")
    for path in sorted(ROOT.glob(pattern))
    if ">>>" in path.read_text()
]

TOPOLOGY = read_topology()
NODE = TOPOLOGY.effective_nodes[0]
FILLED_IN = {  # what a reader would
    "<run>": "sample",
    "RUN_DIR": "data/runs/sample",
    "--run DIR": "--run data/runs/sample",
    "--root DIR": "--root /",
    "--resume DIR": "--resume data/runs/planned",
    "--mlc FILE": "--mlc numa_lab/bandwidth/published/icelake_mlc.txt",
    "--machine NAME": "--machine icelake",
    "--preset NAME": "--preset llama-3-8b",
    "notebooks DIR": "notebooks data/runs/own",
    "--kv-len N": "--kv-len 4096",
    "--batch N": "--batch 2",
    "--dtype D": "--dtype float32",
    "c0m0,c0m1,...": f"c{NODE}m{NODE}",
    "--cpunodebind=0 --membind=0": f"--cpunodebind={NODE} --membind={NODE}",
}

REAL = "PATH=" + shlex.quote(f"{Path(sys.executable).parent}:{os.environ['PATH']}")
STAND_INS = {
    "numactl": f'exec {shutil.which("numactl")} "$@"',
    "sudo": 'exec "$@"',
    "mkdir": f'{REAL}; exec mkdir "$@"',
    "cp": f'{REAL}; cp "$@" 2>/dev/null || [[ -d sys/devices ]]',  # not every file of the machine can be read
    "make": f'{REAL}; exec make --dry-run "$@"',
    "python": f'{REAL}; case "$1" in *.py) set -- "$@" --seconds 1 ;; esac; exec python "$@"',
    "numa-lab": f'{REAL}; case "$1" in sweep) set -- "$@" --dry-run ;; probe) set -- "$@" --seconds 1 ;; esac; '
    'exec python -m numa_lab "$@"',
    # Only a warning tells of a parameter that a notebook does not have.
    "papermill": f'{REAL}; said=$(papermill "$@" --prepare-only 2>&1) && [[ $said != *"unknown parameter"* ]] || '
    '{ echo "$said" >&2; exit 1; }',
    **dict.fromkeys(
        ("apt-get", "conda", "dnf", "mamba", "pip"),
        'for word; do case "$word" in *.txt | *.toml | *.yml) : < "$word" ;; esac; done',
    ),
}

GROUP = re.compile(r"\[(?P<may>-[^]]+)\]|\((?P<must>-[^)]+)\)")  # of usage: [--json], (--run DIR | --machine NAME)
FLAGS = doctest.ELLIPSIS


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A copy of what a reader has, with a run and a planned one in it; beside it, the commands."""
    folder = tmp_path_factory.mktemp("documents")
    copy, commands = folder / "numa_lab", folder / "commands"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs", "tests")
    shutil.copytree(ROOT, copy, ignore=ignored)
    shutil.copytree(ROOT / "data/sample/guest", copy / "data/runs/sample")
    planned = sweep_plan.make_plan(
        profile="smoke", bindings=sweep_bindings.choose_bindings("local", TOPOLOGY), topology=TOPOLOGY,
        measured=notebook_files.find(sweep.MEASURED_NOTEBOOK), parameters={}, run_id="planned", command="numa-lab sweep",
    )  # fmt: skip
    sweep_plan.prepare(planned, copy / "data/runs/planned", TOPOLOGY)
    (copy / ".venv/bin").mkdir(parents=True)
    (copy / ".venv/bin/activate").touch()  # what is active here stays so
    commands.mkdir()
    for name, script in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\nset -eu\n{script}\n")
        (commands / name).chmod(0o755)
    return copy


def shell(text, workplace):
    """What commands print, run where this process is; an error where one fails."""
    for placeholder, value in FILLED_IN.items():
        text = text.replace(placeholder, value)
    script = "\n".join(call for line in text.replace("\\\n", " ").splitlines() for call in calls(line))
    done = subprocess.run(
        ["/bin/bash", "-eu", "-o", "pipefail", "-c", script],
        env={**os.environ, "PATH": str(workplace.parent / "commands")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\nended with {done.returncode}: {done.stderr[-4000:]}"
    return done.stdout


def calls(line):
    """A line as it is; where it shows usage, as few lines as try everything that can be chosen, flags in the last one."""
    groups = list(GROUP.finditer(line))
    counts = [group[0].count("|") + 1 for group in groups]
    turns = max(counts, default=1) + (1 in counts and max(counts) > 1)

    def filled(group, turn):
        must, (option, _, values) = group["must"], (group["may"] or "").partition(" ")
        choices = must.split(" | ") if must else [f"{option} {value}" for value in values.split("|")]
        choices = choices if len(choices) > 1 else [""] * (turns - 1) + choices
        return choices[turn] if turn < len(choices) else choices[0] if must else ""

    return [GROUP.sub(lambda group, turn=turn: filled(group, turn), line) for turn in range(turns)]


def test_usage_stands_for_calls_that_try_each_choice():
    assert calls("numa-lab x RUN  # [sic]") == ["numa-lab x RUN  # [sic]"]
    assert calls("x [--json]") == ["x --json "]
    assert [line.split() for line in calls("x (--run D | --mlc F) [--to a|b|c] [--json] [--cut N]")] == [
        ["x", "--run", "D", "--to", "a"],
        ["x", "--mlc", "F", "--to", "b"],
        ["x", "--run", "D", "--to", "c"],
        ["x", "--run", "D", "--json", "--cut", "N"],
    ]


def run_shell(example):
    shell(example.parsed, example.namespace["workplace"])


def run_python(example):
    printed = StringIO()
    with redirect_stdout(printed):
        PythonEvaluator()(example)
    example.namespace["printed"] = printed.getvalue()


def compare(example):
    """Commands after ``$`` with what they print, or what the block of Python before it prints; ``...`` stands for any lines."""
    commands = re.split(r"^\$ ", example.parsed, flags=re.MULTILINE)
    pairs = [
        (shell(command, example.namespace["workplace"]), shown)
        for command, _, shown in (command.partition("\n") for command in commands[1:])
    ]
    if commands[0]:
        assert "printed" in example.namespace, (
            "no block of Python before it printed this: mark it as text, or begin with $"
        )
        pairs.append((example.namespace.pop("printed"), commands[0]))
    for printed, shown in pairs:
        assert doctest.OutputChecker().check_output(shown, printed, FLAGS), f"shown:\n{shown}\nprinted:\n{printed}"


EVALUATORS = {
    "python": run_python,
    "bash": run_shell,
    "sh": run_shell,
    "console": compare,
    "": compare,
    "json": lambda example: json.loads(example.parsed) and None,
    "text": lambda example: None,
}


def fenced_blocks(document):
    """Each fenced block as a region for sybil, or each ``>>>`` in it."""
    for region in RawFencedCodeBlockLexer(re.compile(r"[ \t]*(?P<language>[^\s`]*)[^\n`]*\n"))(document):
        source, language = region.lexemes["source"], region.lexemes["language"]
        prompts = (
            list(DocTestStringParser(DocTestEvaluator(FLAGS))(source, document.path)) if language != "text" else []
        )
        for prompt in prompts:
            prompt.adjust(region, source)
        assert language in EVALUATORS, f"a block of {language!r}: expected one of {', '.join(EVALUATORS)}"
        yield from prompts or [Region(region.start, region.end, source, EVALUATORS[language])]


def text_of(page):
    if page.suffix == ".md":
        return page.read_text()
    return "\n\n".join(cell.source for cell in notebook_runner.read(page).cells if cell.cell_type == "markdown")


def page(text, path):
    document = Document(text, str(path))
    for region in fenced_blocks(document):
        document.add(region)
    return document


def failures(document, workplace):
    """What is wrong with each example that does not hold."""
    document.namespace["workplace"] = workplace
    found = []
    for example in document.examples():
        try:
            example.evaluate()
        except Exception as failure:
            failure.add_note(f"{document.path}, line {example.line}")
            found.append(failure)
    return found


@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_shown_runs(path, workplace, monkeypatch):
    monkeypatch.chdir(workplace / "notebooks" if path.suffix == ".ipynb" else workplace)
    parsed = path in MODULES and PythonDocStringDocument.parse(str(path), DocTestParser(FLAGS))
    if found := failures(parsed or page(text_of(path), path), workplace):
        raise ExceptionGroup(f"what {path.name} shows", found)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("python\nfrom numa_lab.attention import numa", "cannot import name 'numa'"),
        ("python\n>>> 1 + 1\n3", "Expected: 3"),
        ("python\nprint(1)\n```\n```\n2", "printed: 1"),
        ("\nnot marked as text", "mark it as text"),
        ("bash\nmake reprot", "No rule to make target"),
        ("bash\nmake report && numa-lab topology --jsn", "No such option"),
        ("bash\nnuma-lab predict --machine icelake [--dtype float32|int7]", "int7"),
        ("bash\nneither-here-nor-there", "command not found"),
        ("bash\nconda env create -f environment.yaml.txt", "No such file"),
        ("sh\npapermill notebooks/06_cross_node_overhead.ipynb out.ipynb -p rundir x", "unknown parameter"),
        ("\n$ numa-lab predict --machine icelake\n...\nfaster than light", "printed: measured: icelake"),
    ],
)
def test_what_does_not_hold_is_found(block, reason, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    (failure,) = failures(page(f"```{block}\n```\n", "a page"), workplace)
    assert reason in " ".join(str(failure).split())


def test_a_block_of_an_unknown_kind_is_found():
    with pytest.raises(AssertionError, match="a block of 'toml': expected one of python, bash"):
        page("1. first\n   ```toml\n   a = 1\n   ```\n", "a page")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_links_in_the_text_lead_somewhere(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    text = re.sub(r"^(```|~~~).*?^\1", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    found = [" ".join(code.split()) for code in re.findall(r"(?<!`)`((?:make|numa-lab)\b[^`]*)`", text)]
    shell("\n".join(f"{code} --help" if code.startswith("numa-lab") else code for code in found), workplace)
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", ["index.md", "decode-kernel.md"])
def test_modules_and_names_on_a_page_are_there(page):
    """A module is named by its path in the package, and its functions and classes after it, in parentheses or behind a colon."""
    folder = ROOT / "numa_lab" / ("attention" if page == "decode-kernel.md" else "")
    text = (ROOT / "docs" / page).read_text()
    named = re.findall(r"`([\w./]+\.py)`(?: \(|:\s)?((?:`\w+`(?:, )?)*)", text)
    assert len(named) > 10
    for path, names in named:
        places = [place for place in (folder / path, ROOT / path, ROOT / "bench" / path) if place.is_file()]
        assert places, path
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^(?:def|class) {name}\b|^{name}\b.*=", places[0].read_text(), re.MULTILINE), (
                path,
                name,
            )


def test_every_command_is_in_the_readme():
    shown = set(re.findall(r"^numa-lab (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert shown == set(main.commands)
