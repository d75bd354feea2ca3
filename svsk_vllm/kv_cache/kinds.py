# SPDX-License-Identifier: Apache-2.0
"""Names of the ways to store keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from svsk_kernels.errors import SvskError
from svsk_vllm.kv_cache.rounding import Rounding, int4, q4_0, q4_1, q8_0, raw, rotated

__all__ = ["KEY_KINDS", "PER_CHANNEL", "VALUE_KINDS", "KvKinds"]

PER_CHANNEL: Final = "kpc32"
"""Keys with a scale per channel and 32 tokens."""

_PLAIN: Final[Mapping[str, Rounding]] = {
    "raw": raw,
    "q8_0": q8_0,
    "q4_0": q4_0,
    "q4_1": q4_1,
    "int4": int4,
}

_ROTATED: Final = ("q8_0", "q4_0", "q4_1")

KEY_KINDS: Final[Mapping[str, Rounding | None]] = {
    **_PLAIN,
    **{f"{kind}-rot": partial(rotated, _PLAIN[kind], whole_head=True) for kind in _ROTATED},
    PER_CHANNEL: None,
}
"""How keys are stored token by token; None where it is not token by token."""

VALUE_KINDS: Final[Mapping[str, Rounding]] = {
    **_PLAIN,
    **{f"{kind}-rot": partial(rotated, _PLAIN[kind], whole_head=False) for kind in _ROTATED},
}
"""How values are stored."""

_VALUES_BESIDE: Final = {PER_CHANNEL: "q4_1"}
"""Values that a kind of keys comes with.

Values have no large channels, and attention averages them over tokens: a scale along the head is
what they need, and ``q4_1`` takes 5 bits, as ``kpc32`` does.
"""


@dataclass(frozen=True)
class KvKinds:
    """How a cache stores keys and values.

    Attributes:
        keys: a key of :data:`KEY_KINDS`.
        values: a key of :data:`VALUE_KINDS`.
    """

    keys: str
    values: str

    @classmethod
    def parse(cls, text: str) -> "KvKinds":
        """Read ``KIND``, or ``KEYS:VALUES``; ``kpc32`` alone is ``kpc32:q4_1``.

        Raises:
            SvskError: there is no such kind.
        """
        keys, colon, values = text.partition(":")
        values = values if colon else _VALUES_BESIDE.get(keys, keys)
        for what, kind, known in (("keys", keys, KEY_KINDS), ("values", values, VALUE_KINDS)):
            if kind not in known:
                raise SvskError(
                    f"--kv {text}: {kind!r} is no kind of {what}, expected one of"
                    f" {', '.join(known)}. Give one kind, or two as KEYS:VALUES."
                )
        return cls(keys, values)

    def __str__(self) -> str:
        return f"{self.keys}:{self.values}"
