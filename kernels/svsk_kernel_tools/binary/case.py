# SPDX-License-Identifier: Apache-2.0
"""One kernel in one configuration, as the inspection compiles it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from svsk_kernel_tools.binary.errors import InspectError

__all__ = ["KernelCase"]


@dataclass(frozen=True)
class KernelCase:
    """A kernel with everything its launcher fixes, and what is expected of the binary.

    Attributes:
        name: What reports call it.
        fn: The ``@triton.jit`` function.
        signature: Type of every argument that is not a constexpr, ``{"x_ptr": "*bf16", "m":
            "i32"}``.
        constexprs: Value of every constexpr argument.
        aligned: Arguments (pointers, strides, sizes) that the launcher guarantees to be divisible
            by 16.
        options: Compiler options: ``num_warps``, ``num_stages``, ``launch_pdl``, ...
        weights_per_thread: Weights of one main-loop iteration, divided by the threads of a block:
            what ``instructions_per_weight`` is relative to. None where the number means nothing.
        max_instructions_per_weight: Upper bound for it; None for no bound.
        partial_sums: Whether blocks share a result, through partial sums and a counter.
        packed_weight_pointer: Argument whose loads have to be 16 bytes wide; None for no such
            check.
        mma: "best" asks for the target's fastest tensor-core instructions, "any" for tensor cores,
            "none" for nothing.
        arches: The targets this case is shipped for; None for all.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    weights_per_thread: float | None = None
    max_instructions_per_weight: float | None = None
    partial_sums: bool = False
    packed_weight_pointer: str | None = None
    mma: Literal["best", "any", "none"] = "best"
    arches: tuple[int | str, ...] | None = None

    def check_names(self) -> None:
        """Raise InspectError unless the arguments are the function's, each given once."""
        arguments = set(self.fn.arg_names)
        given = set(self.signature) | set(self.constexprs)
        problems = [
            ("neither in signature nor in constexprs", arguments - given),
            ("not an argument of the kernel", given - arguments),
            ("in signature and in constexprs", set(self.signature) & set(self.constexprs)),
            ("aligned, but not in signature", set(self.aligned) - set(self.signature)),
            (
                "packed_weight_pointer, but not in signature",
                {self.packed_weight_pointer or ""} - {*self.signature, ""},
            ),
        ]
        mistakes = [f"{', '.join(sorted(names))}: {what}" for what, names in problems if names]
        if mistakes:
            raise InspectError(
                f"case {self.name!r} does not fit the kernel's arguments"
                f" ({', '.join(self.fn.arg_names)}): {'; '.join(mistakes)}. Correct the case."
            )
