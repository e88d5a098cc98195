"""Sizes of one attention call, named after published models; bytes and FLOPs follow from them. Never loads torch."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from numa_lab.errors import InvalidInput

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class AttentionShape:
    """One attention call over a batch of equally long sequences.

    Sliding windows, soft-capped scores and attention sinks (Gemma 2, gpt-oss) are no part of a shape.

    Parameters
    ----------
    batch
        Sequences.
    q_heads, kv_heads
        Heads of the query, and of K and V; each KV head serves ``group`` query heads.
    q_len
        New tokens per sequence: the query is ``[batch, q_heads, q_len, head_dim]``.
    kv_len
        Tokens in the cache: K and V are ``[batch, kv_heads, kv_len, head_dim]``.
    head_dim
        Elements per head.
    dtype
        Of all tensors: ``float32``, ``bfloat16`` or ``float16``.

    Raises
    ------
    InvalidInput
        A size is not a positive integer, the heads form no groups, or the dtype is unknown.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        """Refuse a shape that makes no sense."""
        for field in dataclasses.fields(self)[:-1]:
            size = getattr(self, field.name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InvalidInput(f"{field.name}={size!r}: expected a positive integer")
        if self.q_heads % self.kv_heads:
            raise InvalidInput(
                f"q_heads={self.q_heads}, kv_heads={self.kv_heads}: expected q_heads to be a multiple of kv_heads, "
                "because each KV head serves equally many query heads"
            )
        if self.dtype not in ELEMENT_BYTES:
            raise InvalidInput(f"dtype={self.dtype!r}: expected one of {', '.join(ELEMENT_BYTES)}")

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.q_heads // self.kv_heads

    @property
    def kind(self) -> str:
        """``mha`` (a KV head per query head), ``mqa`` (one for all) or ``gqa`` (between the two)."""
        if self.group == 1:
            return "mha"
        return "mqa" if self.kv_heads == 1 else "gqa"

    @property
    def phase(self) -> str:
        """``decode`` for one new token per sequence, else ``prefill``, drafts of a few tokens included."""
        return "decode" if self.q_len == 1 else "prefill"

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V, each counted once: what the best decode has to read."""
        return 2 * self.batch * self.kv_heads * self.kv_len * self.head_dim * self.element_bytes

    @property
    def q_bytes(self) -> int:
        """Bytes of the query."""
        return self.batch * self.q_heads * self.q_len * self.head_dim * self.element_bytes

    @property
    def output_bytes(self) -> int:
        """Bytes of the output, which has the shape of the query."""
        return self.q_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of K, V, query and output together."""
        return self.kv_bytes + self.q_bytes + self.output_bytes

    @property
    def flops(self) -> int:
        """Multiplications and additions of both matrix products, over all pairs of tokens.

        A causal mask is not subtracted: with q_len = kv_len a kernel that skips what is masked does about half.
        The exponentials are not counted.
        """
        return 4 * self.batch * self.q_heads * self.q_len * self.kv_len * self.head_dim

    def replace(self, **changes: Any) -> AttentionShape:
        """Return the same shape with other values, which are checked again."""
        return dataclasses.replace(self, **changes)


def _model(q_heads: int, kv_heads: int, head_dim: int) -> AttentionShape:
    """One token decoded after 4096, as the model's weights are published: in bfloat16."""
    return AttentionShape(1, q_heads, kv_heads, 1, 4096, head_dim, "bfloat16")


# num_attention_heads, num_key_value_heads and head_dim (hidden_size / num_attention_heads where a config has none) of
# the config.json that each model is published with; the name is that of its repository.
PRESETS = {
    "llama-3-8b": _model(32, 8, 128),  # meta-llama/Meta-Llama-3-8B
    "llama-3-70b": _model(64, 8, 128),  # meta-llama/Meta-Llama-3-70B
    "qwen2.5-7b": _model(28, 4, 128),  # Qwen/Qwen2.5-7B
    "qwen3-32b": _model(64, 8, 128),  # Qwen/Qwen3-32B: head_dim is given, hidden_size is 5120
    "mistral-7b": _model(32, 8, 128),  # mistralai/Mistral-7B-v0.3
    "gemma-2-9b": _model(16, 8, 256),  # google/gemma-2-9b: head_dim is given, hidden_size is 3584
    "gpt-oss-20b": _model(64, 8, 64),  # openai/gpt-oss-20b: head_dim is given, hidden_size is 2880
    "falcon-7b": _model(71, 1, 64),  # tiiuae/falcon-7b: multi_query, an odd number of heads
    "llama-2-7b": _model(32, 32, 128),  # meta-llama/Llama-2-7b: a KV head per query head
    "guide": AttentionShape(512, 32, 8, 1, 512, 128, "bfloat16"),  # many short sequences: the case of the guide
}


def preset(name: str, **changes: Any) -> AttentionShape:
    """Return the shape of a model, with other values where they are given.

    Parameters
    ----------
    name
        A key of ``PRESETS``.
    **changes
        Fields of ``AttentionShape`` to replace, such as ``kv_len=32768``.

    Raises
    ------
    InvalidInput
        There is no such preset, or a value makes no sense.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name.lower(), PRESETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InvalidInput(f"preset {name!r}: {hint}expected one of {', '.join(PRESETS)}")
    return PRESETS[name].replace(**changes)


def fit(shape: AttentionShape, memory_bytes: int) -> tuple[AttentionShape, str]:
    """Scale a shape down until K, V, query and output fit into the memory.

    The batch is halved first, because it leaves the work per sequence as it is, then kv_len; a q_len that would
    exceed kv_len follows it.

    Parameters
    ----------
    shape
        What was asked for.
    memory_bytes
        What the tensors of one call may take.

    Returns
    -------
    shape : AttentionShape
        The largest of the tried shapes that fits.
    message : str
        What changed and why; empty where nothing did.

    Raises
    ------
    InvalidInput
        Not even one sequence with a single token fits.
    """
    fitting = shape
    while fitting.total_bytes > memory_bytes:
        if fitting.batch > 1:
            fitting = fitting.replace(batch=fitting.batch // 2)
        elif fitting.kv_len > 1:
            kv_len = fitting.kv_len // 2
            fitting = fitting.replace(kv_len=kv_len, q_len=min(fitting.q_len, kv_len))
        else:
            raise InvalidInput(
                f"memory of {memory_bytes:,} bytes: one sequence of one token takes {fitting.total_bytes:,} with "
                f"{shape.q_heads} query and {shape.kv_heads} KV heads of {shape.head_dim} {shape.dtype} elements; "
                "free memory, or choose a model with smaller heads"
            )
    changes = [
        f"{name} from {before} to {after}"
        for name in ("batch", "kv_len", "q_len")
        if (before := getattr(shape, name)) != (after := getattr(fitting, name))
    ]
    if not changes:
        return shape, ""
    return fitting, (
        f"Scaled down: {', '.join(changes)}. K, V, query and output would take {shape.total_bytes / 2**20:,.1f} MiB "
        f"and may take {memory_bytes / 2**20:,.1f} MiB."
    )
