# SPDX-License-Identifier: Apache-2.0
"""Checks of the kernels against float64 and against themselves.

Poisoned memory, repeats, graphs, streams, variants.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from svsk_kernel_tools.bench.cases import Case, checked_choices
from svsk_kernel_tools.bench.graphs import capture, capture_stream
from svsk_kernel_tools.bench.layers import BenchLayer
from svsk_kernels.gpu.choice import Choice
from svsk_kernels.gpu.folded_product import fold
from svsk_kernels.gpu.launch import counters
from svsk_kernels.gpu.matmul_op import gpu_of

__all__ = ["BOUNDS", "Finding", "check_case", "poisoned", "relative_error"]

BOUNDS: Final = {torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Largest relative error in the Frobenius norm."""

_REPEATS: Final = 3

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Finding:
    """What came of one kernel at one number of tokens."""

    what: str
    error: float  # relative to float64, Frobenius norm
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every uninitialised tensor made inside with NaN or the largest integer."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic  # its settings are properties of a module
    fill = memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cuBLAS warns that it may not be deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True
        try:
            yield
        finally:
            memory.fill_uninitialized_memory = fill
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``."""
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def check_case(case: Case, device: torch.device, graphs: bool = True) -> Iterator[Finding]:
    """Check one layer with each of its numbers of tokens.

    On a GPU with CUDA graphs too, unless told otherwise.
    """
    layer, gpu = case.layer(device), gpu_of(device)
    generator = torch.Generator(device).manual_seed(case.k)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(case.dtype)

    bias = normal(case.n) if case.bias else None
    for m in case.tokens:
        x, other = normal(m, case.k), normal(m, case.k)
        for choice in checked_choices(case, gpu, m):
            trial = _Trial(layer, choice, bias, (x, other))
            yield _check(f"{case.name}, M = {m}, {choice.kernel}", trial, graphs)
        y = layer.dispatched(x, bias)
        error = relative_error(y, layer.expected(x, bias))
        yield Finding(f"{case.name}, M = {m}, dispatched", error, _accuracy(y, error))
    yield _batch_invariance(case, layer, x, bias)


def _batch_invariance(
    case: Case, layer: BenchLayer, x: torch.Tensor, bias: torch.Tensor | None
) -> Finding:
    """Rows of a batch against the same rows alone, or with fewer beside them."""
    fixed = layer.batch_invariant()
    y = fixed.dispatched(x, bias)
    error = relative_error(y, layer.expected(x, bias))
    parts = (slice(0, 1), slice(len(x) - 1, len(x)), slice(len(x) // 3, len(x)))
    equal = all(torch.equal(fixed.dispatched(x[rows], bias), y[rows]) for rows in parts)
    problems = _accuracy(y, error) + (() if equal else ("rows depend on the rows beside them",))
    return Finding(f"{case.name}, M = {len(x)}, batch invariant", error, problems)


def _check(what: str, trial: "_Trial", graphs: bool) -> Finding:
    layer, x, device = trial.layer, trial.inputs[0], trial.device
    with poisoned():
        y = layer.run(x, trial.choice, trial.bias)
    error = relative_error(y, layer.expected(x, trial.bias))
    problems = list(_accuracy(y, error))
    if not problems:  # otherwise nothing below can be equal
        exact = trial.exact(x)
        if not all(torch.equal(exact, trial.exact(x)) for _ in range(_REPEATS)):
            problems.append("repeated runs differ")
        if trial.choice.kernel != "fold" and not torch.equal(exact, y):
            problems.append("results differ where memory was filled before")
        if device.type == "cuda":
            problems += trial.gpu_problems(exact, graphs)
    if counters.busy(device):
        problems.append(f"{counters.busy(device)} counters are not zero afterwards")
    return Finding(what, error, tuple(problems))


def _accuracy(y: torch.Tensor, error: float) -> tuple[str, ...]:
    if not bool(y.isfinite().all()):
        missing = int((~y.isfinite()).sum())
        return (f"{missing} of {y.numel()} outputs were not written, or are not finite",)
    bound = BOUNDS[y.dtype]
    return () if error < bound else (f"relative error {error:.2e}, expected less than {bound:.0e}",)


class _Trial:
    """One layer's product by one kernel, of two inputs."""

    def __init__(
        self, layer: BenchLayer, choice: Choice, bias: torch.Tensor | None, inputs: Pair
    ) -> None:
        self.layer, self.choice, self.bias, self.inputs = layer, choice, bias, inputs
        self.device = inputs[0].device

    def exact(self, x: torch.Tensor, asm: bool | None = None) -> torch.Tensor:
        """What must be the same bits every time.

        The product, but for ``fold`` the weight, as cuBLAS makes the product.
        """
        layer, bits = self.layer, self.layer.spec.factor_bits
        if self.choice.kernel == "fold":
            rows = slice(0, layer.spec.n)
            return fold(layer.base, layer.sidecar, bits, x.dtype, rows, asm=asm)
        return layer.run(x, self.choice, self.bias, asm=asm)

    def gpu_problems(self, y: torch.Tensor, graphs: bool) -> list[str]:
        """Checks that only a GPU can fail: all bit for bit. ``y`` is what the first input gives."""
        (x, other), choice = self.inputs, self.choice
        problems = []
        expected = (y, self.exact(other))
        if (
            choice.kernel == "decode"
            and self.layer.sidecar is not None
            and gpu_of(self.device).dependent_launch
        ):
            changed = replace(choice, pdl=not choice.pdl)
            if not all(
                torch.equal(product, self.layer.run(given, changed, self.bias))
                for given, product in tuple(zip(self.inputs, expected, strict=True)) * _REPEATS
            ):
                problems.append("results with and without dependent launch differ")
        if torch.version.hip is None and not torch.equal(
            self.exact(x, asm=True), self.exact(x, asm=False)
        ):
            problems.append("results of inline PTX and of plain Triton differ")
        if graphs and not self._graphs_agree(expected):
            problems.append("a replayed CUDA graph and an eager run differ")
        if not self._streams_agree(expected):
            problems.append("results on two streams at a time differ from those on one")
        return problems

    def _graphs_agree(self, expected: Pair) -> bool:
        """Replay three products in a graph, with other inputs each time."""
        (x, other), (y, second) = self.inputs, expected
        static = x.clone()
        graph, outputs = capture(  # one after the other, as the layers of a model
            self.device, lambda: [self.exact(given) for given in (static, other, static)]
        )
        for given, product in ((x, y), (other, second), (x, y)):
            static.copy_(given)
            graph.replay()
            if not all(map(torch.equal, outputs, (product, second, product))):
                return False
        return True

    def _streams_agree(self, expected: Pair) -> bool:
        """Run both inputs at the same time, the second on a stream of its own."""
        current, side = torch.cuda.current_stream(self.device), capture_stream(self.device)
        side.wait_stream(current)
        products: list[torch.Tensor] = []
        for _ in range(_REPEATS):
            products.append(self.exact(self.inputs[0]))
            with torch.cuda.stream(side):
                products.append(self.exact(self.inputs[1]))
        current.wait_stream(side)
        torch.cuda.synchronize(self.device)
        return all(map(torch.equal, products, expected * _REPEATS))
