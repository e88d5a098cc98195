"""The errors that numa_lab raises for its users; each message names the value, what was expected and the fix."""

import sys
from collections.abc import Callable


class NumaLabError(Exception):
    """Base of all errors of numa_lab. The command line prints the message alone and exits with ``exit_status``."""

    exit_status = 1


class InvalidInput(NumaLabError, ValueError):
    """A value that the user gave makes no sense here."""

    exit_status = 2


class WrongType(InvalidInput, TypeError):
    """A value is of a type that does not serve here, such as an array where a tensor is expected."""


class NodeUnavailable(InvalidInput):
    """A NUMA node does not exist, or this process may not use its CPUs or its memory."""


class MissingDependency(NumaLabError):
    """A system tool or library is not installed; the message holds the line to type."""


class LimitReached(NumaLabError):
    """A limit of this process or container leaves too little: shared memory, open files, or address space."""


class RunDirectoryError(NumaLabError):
    """A run directory is empty, half written, of another schema version, or can't be written."""


class MachineMismatch(NumaLabError):
    """Results of several machines were about to be mixed."""


class UntrustedResult(NumaLabError):
    """What was measured contradicts what was asked for, or is wrong."""


class NotPermitted(NumaLabError, PermissionError):
    """The kernel refused a NUMA call, as the default seccomp profile of containers does."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function; an error of numa_lab ends it with the message alone and its exit status."""
    try:
        main()
    except NumaLabError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)
