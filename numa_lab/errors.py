"""The errors that numa_lab raises for its users; each message names the value, what was expected and the fix."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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


class CompilerUnusable(NumaLabError):
    """Numba or llvmlite, as they are installed here, can't be imported or can't compile; the message says which versions can."""


class SuiteNotInstalled(MissingDependency, ModuleNotFoundError):
    """What was asked for needs the notebook suite, and a package of it is not installed."""


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


@contextmanager
def suite_needed() -> Iterator[None]:
    """Say how the notebook suite is installed where the block imports a package that is not there.

    Raises
    ------
    SuiteNotInstalled
        Naming the package, and the line to type.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "numa_lab") or isinstance(error, SuiteNotInstalled):
            raise
        raise SuiteNotInstalled(
            f"{package} is not installed, and this needs it, as notebooks, sweeps, tables and reports do; type: "
            "pip install 'numa_lab[lab]'",
            name=error.name,
        ) from error


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function; an error of numa_lab ends it with the message alone and its exit status."""
    try:
        with suite_needed():
            main()
    except NumaLabError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)
