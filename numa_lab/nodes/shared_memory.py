"""Room for the tensors that processes share: they need space in /dev/shm, which containers make small, and open files.

A process that touches a page for which a full /dev/shm has no room is killed (SIGBUS), so the room is looked at before.

Limits: what is free now may be taken the next moment by another process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numa_lab.errors import LimitReached
from numa_lab.machine import open_files

FOLDER = Path("/dev/shm")


def require(nbytes: int, tensors: int) -> None:
    """Refuse to share so many bytes, in so many tensors, where there is less room.

    Raises
    ------
    LimitReached
        The message holds what is needed, what there is, and the fix.
    """
    if nbytes:
        free = _free_bytes()
        if free is None or nbytes > free:
            there = "can't be written" if free is None else f"has {free / 2**20:,.0f} MiB free"
            gib = -(-2 * nbytes // 2**30)
            raise LimitReached(
                f"{nbytes / 2**20:,.0f} MiB of shared memory are needed, and {FOLDER} {there}: start the container with more "
                f"(`docker run --shm-size={gib}g IMAGE`; in Kubernetes a volume emptyDir with medium Memory, mounted there), or "
                f"mount -o remount,size={gib}g {FOLDER}"
            )
    if tensors:
        open_files.require(tensors, f"{tensors} shared tensors")


def _free_bytes() -> int | None:
    """Return how many bytes /dev/shm can still hold; None where there is none that can be written."""
    try:
        filesystem = os.statvfs(FOLDER)
    except OSError:
        return None
    if not os.access(FOLDER, os.W_OK | os.X_OK):
        return None
    return filesystem.f_bavail * filesystem.f_frsize


def require_for(*values: Any) -> None:
    """Refuse values whose tensors can't all be shared; tensors in lists, tuples and mappings count too.

    Raises
    ------
    LimitReached
        As ``require`` does.
    """
    storages = {}
    for tensor in _tensors(values):
        if tensor.device.type == "cpu" and not tensor.is_shared():
            storage = tensor.untyped_storage()  # all of it is shared, whatever part of it the tensor is
            storages[storage.data_ptr()] = storage.nbytes()
    require(sum(storages.values()), len(storages))


def share(value: Any) -> Any:
    """Move the tensors of a value to shared memory, so that it can be passed to another process; return the value.

    Raises
    ------
    LimitReached
        As ``require`` does.
    """
    require_for(value)
    with clear_errors():
        for tensor in _tensors(value):
            if tensor.device.type == "cpu" and not tensor.requires_grad:
                tensor.share_memory_()
    return value


@contextmanager
def clear_errors() -> Iterator[None]:
    """Replace torch's errors about a full /dev/shm, and about too many open files, by ones that name the fix.

    Raises
    ------
    LimitReached
        In place of the error.
    """
    try:
        with open_files.explained("sharing a tensor"):
            yield
    except RuntimeError as error:
        text = str(error)
        if "Too many open files" in text:
            raise LimitReached(f"sharing a tensor: {text}. Raise `ulimit -n`") from error
        if "shared memory" in text or "No space left" in text:
            free = _free_bytes()
            there = "can't be written" if free is None else f"has {free / 2**20:,.0f} MiB free"
            raise LimitReached(f"{FOLDER} {there} ({text}): docker run --shm-size=... makes it larger") from error
        raise


def _tensors(value: Any) -> Iterator[Tensor]:
    if type(value) is Tensor or isinstance(value, torch.nn.Parameter):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, Mapping):
        for element in value.values():
            yield from _tensors(element)
    elif isinstance(value, (list, tuple)):
        for element in value:
            yield from _tensors(element)
