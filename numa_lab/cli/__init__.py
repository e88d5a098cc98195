"""The command line. Each command imports what it needs inside itself, so that those without torch start at once."""

from __future__ import annotations

import click

from numa_lab import __version__
from numa_lab.cli import machine_commands, run_commands
from numa_lab.cli.group import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Measure what NUMA placement does to attention on this machine, prove it, and say what to do."""


for command in (
    machine_commands.topology,
    machine_commands.doctor,
    machine_commands.probe,
    machine_commands.detect,
    machine_commands.predict,
    run_commands.notebooks,
    run_commands.sweep,
    run_commands.verdict,
    run_commands.report,
):
    main.add_command(command)
