# SPDX-License-Identifier: Apache-2.0
"""What a quantisation holds in memory and in temporary files, from shapes alone.

- statistics: while a block is quantised a float32 [K, K] for each of its linears (fewer where
  linears share an input; two where first tokens are kept apart, but not of experts), and five of
  the widest and three [N, K] of the largest; while gradients are measured two [K, K] and, with
  directions, two [N, N] for each;
- what is made of a block: its codes, a byte each, and then, to measure the errors of its outputs,
  two differences of each weight in the dtype of the arithmetic;
- where weights aim at the dense model's outputs, seven [K, K] of the widest instead, the block's
  quantised weights beside its dense ones, those aimed at in float32 (experts have none), and of all
  samples the hidden states and a block's inputs in the dense model;
- hidden states of all samples, and while gradients are measured those before every block;
- one block's weights in the dtype of the arithmetic, or embedding and head while they are written.

Activations of the batch under way come on top, and pages of the model's files, which the system
takes back when it needs them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from svsk_kernels.errors import SvskError
from svsk_offline.calibration.room import UNLIMITED, Room
from svsk_offline.planning.sweep_samples import SweepSamples
from svsk_offline.recipe import AlternatingRecipe, Recipe
from svsk_offline.storage.dense_model import ModelSource
from svsk_vllm.format import ConfigGroup
from svsk_vllm.format.experts import expert_layers

__all__ = ["Needs"]

_FLOAT32: Final = 4
_PACKED: Final = 5
"""Bytes of a table's weight while it is written: its code, and the 32 bits that it is packed in."""
_GIB: Final = 1 << 30


@dataclass(frozen=True)
class _Moments:
    """Numbers in second moments: of a block at a time, and of what cannot be taken apart."""

    block: int
    largest: int


@dataclass(frozen=True)
class _Linears:
    """The linears to quantise, block by block: some are of experts, and of some all is ignored."""

    blocks: list[dict[str, nn.Linear]]
    mixtures: list[list[str]]

    @classmethod
    def of(cls, source: ModelSource, schemes: Mapping[str, ConfigGroup]) -> "_Linears":
        blocks = [
            {full: one for _, full, one in source.linears(index) if full in schemes}
            for index in range(len(source.blocks[1]))
        ]
        return cls(blocks, [*expert_layers(schemes).values()])

    def most(self, size: Callable[[nn.Linear], int]) -> int:
        """Of the block where the sum over its linears is largest; 0 where there is none."""
        return max((sum(map(size, block.values())) for block in self.blocks), default=0)

    def largest(self, size: Callable[[nn.Linear], int]) -> int:
        """Of the linear where it is largest."""
        return max(size(one) for block in self.blocks for one in block.values())

    def moments(self, recipe: AlternatingRecipe) -> _Moments:
        """Of inputs, while a block is quantised."""
        experts = {name for names in self.mixtures for name in names}
        apart = {  # the moments of first tokens are
            id(one)
            for block in self.blocks
            for name, one in block.items()
            if name not in experts and recipe.sink_weight(name)
        }

        def size(one: nn.Linear) -> int:
            return one.in_features**2 * (2 if id(one) in apart else 1)

        largest = self.largest(size)
        if not recipe.alternating.aim:
            return _Moments(self.most(size), largest + self._pools())
        # One input at a time, but of a projection's experts as many as there is room for.
        modules = {name: one for block in self.blocks for name, one in block.items()}
        stages = (sum(size(modules[name]) for name in names) for names in self.mixtures)
        return _Moments(max(stages, default=0), largest + self._pools())

    def measured(self, sides: int) -> _Moments:
        """Of inputs, and ``sides`` times of outputs' gradients, while gradients are measured."""

        def size(one: nn.Linear) -> int:
            return 2 * one.in_features**2 + sides * one.out_features**2

        return _Moments(self.most(size), self.largest(size) + self._pools())

    def without_experts(self) -> "_Linears":
        """All but those of mixtures of experts."""
        experts = {name for names in self.mixtures for name in names}
        blocks = (
            {name: one for name, one in block.items() if name not in experts}
            for block in self.blocks
        )
        return _Linears([block for block in blocks if block], [])

    def _pools(self) -> int:
        """Sums over all experts of gate's, up's and down's inputs."""
        return 3 * self.largest(lambda one: one.in_features) ** 2 if self.mixtures else 0


def _weights(one: nn.Linear) -> int:
    return one.in_features * one.out_features


@dataclass(frozen=True)
class Needs:
    """Bytes that a run takes.

    Attributes:
        program: what the libraries take.
        weights: of one block, or of embedding and head.
        hidden: hidden states of all samples.
        inputs: those before every block, while gradients are measured.
        paired: hidden states and a block's inputs in the dense model, with an aim.
        fit: matrices that a fit holds, whatever the linear is.
        statistics: second moments of a block while it is quantised.
        made: codes of a block.
        differences: between a block's weights and what was made of them.
        gradients: the same while gradients are measured, those of outputs included.
        largest: of the two above for one linear, and sums over experts.
    """

    program: int
    weights: int
    hidden: int
    inputs: int
    paired: int
    fit: int
    statistics: int
    made: int
    differences: int
    gradients: int
    largest: int

    @classmethod
    def of(
        cls,
        source: ModelSource,
        recipe: Recipe,
        schemes: Mapping[str, ConfigGroup],
        samples: int,
        *,
        itemsize: int,
        program: int,
    ) -> "Needs":
        """Of one recipe and model.

        Args:
            source: the dense model.
            recipe: how.
            schemes: of the linears to quantise, by full name.
            samples: of calibration.
            itemsize: bytes of a number of the arithmetic of blocks.
            program: bytes that the libraries take.
        """
        model: Any = source.model
        seq_len = recipe.calibration.seq_len
        table = model.get_input_embeddings().weight
        state = table.shape[1] * itemsize * seq_len  # hidden states of a sample
        linears = _Linears.of(source, schemes)
        widest = linears.largest(lambda one: one.in_features)
        made = linears.most(_weights)
        moments = measured = _Moments(0, 0)
        fit = 3 * linears.largest(_weights)
        inputs = paired = 0
        copies = 1
        if isinstance(recipe, AlternatingRecipe):
            fit += (7 if recipe.alternating.aim else 5) * widest**2
            moments = linears.moments(recipe)
            if recipe.needs_gradients:
                args = recipe.gradients
                count = SweepSamples.of(widest, seq_len, args.samples, samples).count
                inputs = len(linears.blocks) * (samples if args.token_power else count) * state
                measured = linears.measured(2 if args.directions else 0)
            if recipe.alternating.aim:
                copies = 2
                read_alike = linears.without_experts()  # by both models, but for errors
                fit += read_alike.most(_weights)
                # At most: linears that read one input keep it once.
                features = read_alike.most(lambda one: one.in_features)
                paired = samples * (state + features * seq_len * itemsize)
        block = max(sum(one.numel() for one in part.parameters()) for part in source.blocks[1])
        head = model.get_output_embeddings()
        tied = head is None or head.weight is table
        outside = table.numel() + (0 if tied else head.weight.numel())
        return cls(
            program=program,
            weights=max(copies * block * itemsize, outside * (itemsize + _PACKED)),
            hidden=samples * state,
            inputs=inputs,
            paired=paired,
            fit=fit * _FLOAT32,
            statistics=moments.block * _FLOAT32,
            made=made,
            differences=2 * made * itemsize,
            gradients=measured.block * _FLOAT32,
            largest=max(moments.largest, measured.largest) * _FLOAT32,
        )

    def within(self, budget: int | None) -> Room:
        """How what can be bounded is bounded, so that all stays within a budget.

        Half of what the unavoidable leaves is for hidden states, of which there are two tensors at
        a time, and half for statistics.

        Args:
            budget: bytes; None for no limit.

        Raises:
            SvskError: the unavoidable takes more.
        """
        if budget is None:
            return UNLIMITED
        needed = self.program + self.weights + self.made + self.fit + self.largest
        left = budget - needed
        if left < 0:
            parts = {
                "the program": self.program,
                "a block, or embedding and head": self.weights,
                "codes of a block": self.made,
                "the fit of a matrix": self.fit,
                "statistics of one": self.largest,
            }
            listed = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in parts.items() if size)
            raise SvskError(
                f"--memory-budget {budget / _GIB:.3g}: expected {needed / _GIB:.2f} GiB or more for"
                f" this model and recipe ({listed}). Raise it, or take a recipe that holds less:"
                " `svsk quantize --dry-run --recipe fast` says what another would."
            )
        return Room(min(UNLIMITED.hidden, left // 4), left // 2 + self.largest)

    def memory(self, room: Room) -> dict[str, int]:
        """What is held in memory, by what it is."""

        def kept(size: int) -> int:
            return size if size <= room.hidden else 0

        def gathered(size: int) -> int:
            return size if room.statistics is None else min(size, room.statistics)

        return {
            "the program": self.program,
            "hidden states": kept(self.hidden),
            "inputs of all blocks": kept(self.inputs),
            "inputs in the dense model": kept(self.paired),
            "a block, or embedding and head": self.weights,
            "codes of a block": self.made,
            "statistics of a block": max(
                gathered(self.statistics) + self.fit, gathered(self.differences)
            ),
            "gradients' statistics": gathered(self.gradients),
        }

    def disk(self, room: Room) -> dict[str, int]:
        """What is held in temporary files, by what it is."""
        sizes = {
            "hidden states": self.hidden,
            "inputs of all blocks": self.inputs,
            "inputs in the dense model": self.paired,
        }
        return {name: size if size > room.hidden else 0 for name, size in sizes.items()}
