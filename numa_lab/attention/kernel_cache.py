"""Compiled kernels are kept here, in memory and on disk: compiling one takes seconds, loading it some milliseconds.

Numba's own cache hardly helps, because it stores code that still has to be compiled to machine code. So the finished machine code is
stored, through llvmlite's public interface. A file is named after all that decides its content: this package's sources, the versions
of Numba and llvmlite, the CPU and its features. It is written under another name and then renamed, so that any number of
processes may share the folder, and it begins with a checksum, so that a damaged file is replaced. Where nothing can be kept (there is no
home, the folder can't be written, the disk is full), each process compiles for itself.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from numa_lab.attention import merge_kernel, vectors
from numa_lab.errors import CompilerUnusable
from numa_lab.machine import cache_folder
from numa_lab.placement import jit

_ENTRY = "numa_lab_kernel"
# The modules of which all kernels are made.
_SOURCES = (
    "processors", "vectors", "compiler", "simd", "panels", "tiles", "score_tile", "softmax_step", "value_tile", "decode_spec",
    "panel_steps", "decode_kernel",
)  # fmt: skip
_DIGEST_BYTES = hashlib.sha256().digest_size
_engines: list[Any] = []  # they own the machine code
_failures: list[CompilerUnusable] = []  # what compiling came to in this process, the first failure first


class KernelSpec(Protocol):
    """One version of a kernel; its ``repr`` names it."""

    def build(self) -> Any:
        """Let Numba compile it; return the ``cfunc``."""


@cache
def address(spec: KernelSpec) -> int:
    """Return the address of one version of a kernel, which is loaded from disk, or compiled and stored.

    Raises
    ------
    CompilerUnusable
        Numba or llvmlite can't be imported or can't compile it; ``require_compiler`` raises it from then on.
    """
    with _compiling():
        kept = folder()
        path = kept / f"kernel-{_fingerprint(spec)}.o" if kept else None
        code = _read(path) if path else None
        if code is None:
            code = machine_code(spec)
            if path:
                _write(path, code)
        return _load(code)


def require_compiler() -> None:
    """Raise what was raised where a kernel could not be compiled in this process, or where there is no Numba.

    Raises
    ------
    CompilerUnusable
        With the same cause.
    """
    if not _failures:
        with _compiling():
            import numba  # noqa: F401
    else:
        raise CompilerUnusable(*_failures[0].args) from _failures[0].__cause__


def try_compiler() -> str:
    """Compile, or load, a small kernel that needs most of what kernels are made of; return what ``CompilerUnusable`` says, or nothing."""
    try:
        with _compiling():
            from numa_lab.attention import decode_kernel  # noqa: F401

            cpu_vectors = vectors.host()
        if cpu_vectors:
            address(merge_kernel.MergeSpec(vectors.Rows(cpu_vectors, vectors.Kind.FLOAT32, 8)))
    except CompilerUnusable as error:
        return str(error)
    return ""


@contextmanager
def _compiling() -> Iterator[None]:
    """Keep in mind that nothing can be compiled, where that is seen in the block."""
    try:
        with jit.needed():
            yield
    except CompilerUnusable as error:
        _failures.append(error)
        raise


def folder() -> Path | None:
    """Return the folder in which compiled kernels are kept; None where this user has no place for them."""
    kept = cache_folder.path()
    return kept / "kernels" if kept else None


def machine_code(spec: KernelSpec) -> bytes:
    """Compile one version of a kernel for this CPU; return an object file that needs nothing but the C library's mathematics."""
    target = _target_machine()
    return bytes(target.emit_object(_module(spec, target)))


def assembly(spec: KernelSpec, target: Any = None) -> str:
    """Return the same as text, for reading; for another CPU where its ``TargetMachine`` of llvmlite is given."""
    target = target or _target_machine()
    return str(target.emit_assembly(_module(spec, target)))


def _module(spec: KernelSpec, target: Any) -> Any:
    """Return Numba's code for one version, optimised as a whole.

    Numba declares each function as one that others may replace, and so LLVM keeps the code by which functions raise Python errors. Where
    functions are private to the module, LLVM proves that none is raised, and removes that code.
    """
    import llvmlite.binding as llvm

    entry = spec.build()
    module = llvm.parse_assembly(entry.inspect_llvm())
    for function in module.functions:
        if not function.is_declaration and function.name != entry.native_name:
            function.linkage = "internal"
    module.get_function(entry.native_name).name = _ENTRY
    module.triple, module.data_layout = target.triple, str(target.target_data)
    passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    return module


def _target_machine() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=vectors.target_features(), opt=3, jit=True
    )


def _load(code: bytes) -> int:
    import llvmlite.binding as llvm

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(_ENTRY))


@cache
def _origin(module: str) -> bytes:
    """Return a digest of all that decides the code of the kernels that a module defines."""
    import llvmlite
    import llvmlite.binding as llvm
    import numba

    digest, here = hashlib.sha256(), Path(__file__)
    for source in (*(here.with_name(f"{name}.py") for name in _SOURCES), sys.modules[module].__file__):
        digest.update(Path(str(source)).read_bytes())
    facts = (
        numba.__version__, llvmlite.__version__, numba.config.OPT, llvm.get_host_cpu_name(),
        vectors.target_features(),
    )  # fmt: skip
    digest.update(repr(facts).encode())
    return digest.digest()


def _fingerprint(spec: KernelSpec) -> str:
    return hashlib.sha256(_origin(type(spec).__module__) + repr(spec).encode()).hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    """Return the code that was kept; None where there is none that can be used.

    Since it runs in this process, files of other users than this one and root are not used: XDG_CACHE_HOME may name a shared folder.
    """
    try:
        # Opening must not wait, as it would for a pipe of this name.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_uid not in (0, os.geteuid()):
                return None
            stored = file.read()
    except OSError:  # there is no file, or this user may not read it: the kernel is compiled
        return None
    code = stored[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == stored[:_DIGEST_BYTES] else None


def _write(path: Path, code: bytes) -> None:
    """Keep the code for other processes, if the folder can be written; without it, each process compiles for itself."""
    # This fails where the folder can't be made or written, where it is a file, and where the disk is full.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file that is not renamed, because it was not written completely, is removed.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".", ignore_cleanup_errors=True) as own:
            whole = Path(own) / path.name
            whole.write_bytes(hashlib.sha256(code).digest() + code)
            os.replace(whole, path)
