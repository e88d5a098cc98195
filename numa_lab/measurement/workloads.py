"""Which cases one execution measures: profiles over a model's attention shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from numa_lab.attention.shapes import AttentionShape, fit, preset
from numa_lab.errors import InvalidInput
from numa_lab.machine.topology import Topology
from numa_lab.placement.binding import Binding

MEMORY_SHARE = 0.5  # of the binding's memory, for K and V: the rest is the system's and the allocator's


@dataclass(frozen=True)
class Profile:
    """How much is measured. Lengths are in tokens, and each value of a curve multiplies `kv_len` or `batch` of the base case."""

    name: str
    executions: int  # processes per binding
    case_seconds: float
    kv_len: int
    prefill_len: int
    dtypes: tuple[str, ...]
    kv_len_curve: tuple[float, ...]
    batch_curve: tuple[int, ...]
    bindings: str  # as `numa-lab sweep --bindings` takes them


_BOTH = ("bfloat16", "float32")
PROFILES = {
    p.name: p
    for p in (
        Profile("smoke", 1, 0.05, 256, 32, ("bfloat16",), (), (), "local"),
        Profile("quick", 5, 0.3, 4096, 256, _BOTH, (0.125, 0.5, 2), (2, 4), "matrix"),
        Profile("standard", 8, 1.0, 4096, 512, _BOTH, (0.125, 0.25, 0.5, 2, 4), (2, 4, 8), "matrix"),
        Profile("full", 10, 2.0, 8192, 1024, (*_BOTH, "float16"),
                (1 / 16, 1 / 8, 1 / 4, 1 / 2, 2, 4, 8), (2, 4, 8, 16), "all"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One attention call to time, and with how many threads."""

    shape: AttentionShape
    threads: int


CASE_KEY = ("attention", "phase", "batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "dtype", "threads")


def case_key(case: Case) -> tuple[object, ...]:
    """Return the values of ``CASE_KEY``, as tidy rows hold them."""
    return (case.shape.kind, *(getattr(case.shape, name) for name in CASE_KEY[1:-1]), case.threads)


def case_words(key: Sequence[object]) -> str:
    """Name a case in words, from the values of ``CASE_KEY``."""
    case = dict(zip(CASE_KEY, key, strict=True))
    threads = "1 thread" if case["threads"] == 1 else f"{case['threads']} threads"
    return (
        f"{str(case['attention']).upper()} {case['phase']} in {case['dtype']}, batch {case['batch']}, "
        f"kv_len {case['kv_len']}, {threads}"
    )


@dataclass(frozen=True)
class Workload:
    """What one execution measures: a profile, over the heads of a model."""

    profile: Profile
    base: AttentionShape
    message: str  # how the shape was scaled down to this machine; empty where it was not

    def cases(self, cores: int) -> list[Case]:
        """List every case once, for a binding of `cores` physical cores."""
        counts = sorted({1, max(1, cores // 2), cores})
        shapes = [(shape, counts[-1:]) for shape in self._shapes()]
        decode = self.base.replace(dtype=self.profile.dtypes[0])
        shapes += [(decode, counts)]
        shapes += [
            (decode.replace(kv_len=max(1, int(decode.kv_len * factor))), counts[-1:])
            for factor in self.profile.kv_len_curve
        ]
        shapes += [(decode.replace(batch=decode.batch * factor), counts[-1:]) for factor in self.profile.batch_curve]
        return list(dict.fromkeys(Case(shape, threads) for shape, thread_counts in shapes for threads in thread_counts))

    def _shapes(self) -> Iterator[AttentionShape]:
        """GQA as the model has it, and what it would be with a KV head per query head, or with a single one."""
        prefill = min(self.profile.prefill_len, self.base.kv_len)
        kv_heads = dict.fromkeys((self.base.kv_heads, self.base.q_heads, 1))
        for heads in kv_heads:
            for dtype in self.profile.dtypes:
                shape = self.base.replace(kv_heads=heads, dtype=dtype)
                yield shape
                yield shape.replace(batch=1, q_len=prefill, kv_len=prefill)

    @property
    def largest_kv_bytes(self) -> int:
        """Bytes of K and V of the largest case."""
        return max(case.shape.kv_bytes for case in self.cases(1))


def usable_bytes(topology: Topology, binding: Binding) -> int:
    """Return how many bytes K and V may take under a binding, by the memory of its nodes and by the limits of control groups."""
    return int(MEMORY_SHARE * topology.capacity_bytes(binding.mem_nodes or topology.allowed_nodes))


def workload(profile: str, model: str, kv_len: int = 0, batch: int = 0, *, memory_bytes: int) -> Workload:
    """Choose what the executions of a profile measure.

    Parameters
    ----------
    profile
        A key of ``PROFILES``.
    model
        A preset of ``numa_lab.attention.shapes``.
    kv_len, batch
        Tokens in the cache and sequences of the base case; 0 for the profile's kv_len and a batch of 1. The preset
        ``guide`` brings its own of both.
    memory_bytes
        What the tensors of one call may take. Where it does not suffice the base case is scaled down, and ``message`` says so.

    Returns
    -------
    The workload, whose ``cases`` are what is timed.

    Raises
    ------
    InvalidInput
        An unknown profile or preset, or a negative length.
    """
    if profile not in PROFILES:
        raise InvalidInput(f"profile {profile!r}: expected one of {', '.join(PROFILES)}")
    if kv_len < 0 or batch < 0:
        raise InvalidInput(f"kv_len={kv_len}, batch={batch}: expected positive numbers, or 0 for the profile's own")
    chosen, shape = PROFILES[profile], preset(model, q_len=1)
    if model != "guide":
        shape = shape.replace(kv_len=chosen.kv_len, batch=1)
    shape = shape.replace(kv_len=kv_len or shape.kv_len, batch=batch or shape.batch)
    # The widest case holds a KV head per query head in the widest dtype, or the end of a curve.
    widest = max((*chosen.kv_len_curve, *chosen.batch_curve, 2 * shape.group), default=1)
    scaled, message = fit(shape, int(memory_bytes / widest))
    return Workload(chosen, scaled, message)
