"""A seccomp filter as containers install it: the kernel then refuses some system calls of this process, for good."""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from collections.abc import Iterable

NUMBERS = {  # asm/unistd_64.h, asm-generic/unistd.h
    "x86_64": {
        "madvise": 28, "sched_setaffinity": 203,
        "mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239, "move_pages": 279,
    },
    "aarch64": {
        "madvise": 233, "sched_setaffinity": 122,
        "mbind": 235, "get_mempolicy": 236, "set_mempolicy": 237, "move_pages": 239,
    },
}  # fmt: skip
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # linux/seccomp.h
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2


def refuse(calls: Iterable[str]) -> None:
    """Have the kernel answer EPERM to these calls, from the calling thread and those that it starts."""
    numbers = [NUMBERS[platform.machine()][call] for call in calls]
    program = [(_LOAD, 0, 0, 0)]  # the number of the system call
    program += [(_JUMP_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    described = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for option, *values in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(described)),
    ):
        if libc.prctl(option, *values) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
