"""Compiled kernels, kept in memory and on disk: compiling one takes seconds, loading it some milliseconds.

Numba's own cache hardly helps here (it compiles on, from what it stored), so the finished machine code is stored, through
llvmlite's public interface. A file is named after all that decides about its content: this package's sources, the versions
of Numba and llvmlite, the CPU and its features. It is written under another name and renamed, so that any number of
processes may share the folder, and begins with a checksum, so that a damaged one is made anew.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import platformdirs

from numa_lab import simd
from numa_lab.attention import decode_kernel, merge_kernel, tiles
from numa_lab.attention.decode_kernel import Spec
from numa_lab.attention.merge_kernel import MergeSpec

_ENTRY = "numa_lab_kernel"
_DIGEST_BYTES = hashlib.sha256().digest_size
_engines: list[Any] = []  # they own the machine code


@cache
def address(spec: Spec | MergeSpec) -> int:
    """Address of the compiled ``void (void *)`` of one version of a kernel: loaded from disk, or compiled and stored."""
    path = folder() / f"kernel-{_fingerprint(spec)}.o"
    code = _read(path)
    if code is None:
        code = machine_code(spec)
        _write(path, code)
    return _load(code)


def folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(platformdirs.user_cache_dir("numa_lab")) / "kernels"


def machine_code(spec: Spec | MergeSpec) -> bytes:
    """Compile one version of the kernel for this CPU, as an object file that needs nothing but the C library's mathematics."""
    target = _target_machine()
    return bytes(target.emit_object(_module(spec, target)))


def assembly(spec: Spec | MergeSpec, target: Any = None) -> str:
    """The same as text, for reading; for another CPU where llvmlite's ``TargetMachine`` of it is given."""
    target = target or _target_machine()
    return str(target.emit_assembly(_module(spec, target)))


def _module(spec: Spec | MergeSpec, target: Any) -> Any:
    """Numba's code for a version, optimised as a whole.

    Numba links each function as one that others may replace, and so keeps its ways of raising Python errors. Made private
    to the module they prove impossible, and the passes remove them.
    """
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
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )


def _load(code: bytes) -> int:
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(_ENTRY))


@cache
def _origin() -> bytes:
    """Digest of all that decides about every kernel's code."""
    digest = hashlib.sha256()
    for module in (simd, tiles, decode_kernel, merge_kernel):
        digest.update(Path(str(module.__file__)).read_bytes())
    facts = (
        numba.__version__, llvmlite.__version__, numba.config.OPT, llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
    )  # fmt: skip
    digest.update(repr(facts).encode())
    return digest.digest()


def _fingerprint(spec: Spec | MergeSpec) -> str:
    return hashlib.sha256(_origin() + repr(spec).encode()).hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    try:
        stored = path.read_bytes()
    except OSError:  # there is none, or this user may not see it: it is compiled
        return None
    code = stored[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == stored[:_DIGEST_BYTES] else None


def _write(path: Path, code: bytes) -> None:
    """Keep the code for other processes, where the folder can be written: without it, each compiles for itself."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
    except OSError:
        return
