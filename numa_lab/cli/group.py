"""What all commands share: how errors and Ctrl-C end them, and how JSON is asked for and printed."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from numa_lab.errors import NumaLabError, suite_needed

INTERRUPTED = 130  # 128 + SIGINT, as shells say it: click's own 1 is that of a sweep some of whose executions failed


class Group(click.Group):
    """Prints the project's own errors as one message on stderr, without a traceback, and says where Ctrl-C ended it."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; Ctrl-C ends it with a word on stderr."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("numa-lab: stopped", err=True)
            sys.exit(INTERRUPTED)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; an error that the user can mend ends it with its message and its exit status."""
        try:
            with suite_needed():
                return super().main(*args, **kwargs)
        except NumaLabError as error:
            click.echo(f"numa-lab: {error}", err=True)
            sys.exit(error.exit_status)
        except OSError as error:
            click.echo(f"numa-lab: {error}", err=True)
            sys.exit(1)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON only.")


def print_json(value: object) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=1, allow_nan=False))
