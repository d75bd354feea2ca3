# SPDX-License-Identifier: Apache-2.0
"""What is decided about every linear before any is quantised.

Its scheme, and what its tokens and rows count.

Without a bit budget and without gradient weights there is nothing to measure. With either, one
sweep of the loss's gradient over the calibration text gives both
(:func:`svsk_offline.calibration.sweep_gradients`).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch
from torch import nn

from svsk_kernels.errors import SvskError
from svsk_offline.calibration import (
    CalibrationSet,
    InputStatistics,
    OutputGradients,
    sweep_gradients,
)
from svsk_offline.calibration.held_out import split_order
from svsk_offline.planning.bit_budget import Choice, allocate
from svsk_offline.planning.error_curves import choices_of, scheme_with
from svsk_offline.planning.serving import vllm_class_of
from svsk_offline.precision import block_dtype
from svsk_offline.recipe import AlternatingRecipe, Recipe
from svsk_offline.storage.atomic import write_tensors
from svsk_offline.storage.dense_model import ModelSource
from svsk_vllm.format import ConfigGroup, LinearSpec, ShardedReader, SvskCheckpointConfig

__all__ = ["Plan", "make_plan", "uniform_schemes"]

_TOKENS_PER_WIDTH: Final = 4
"""Tokens that losses are fitted to for each input feature of the widest matrix.

On SmolLM2's up_proj the error on other tokens is 4.1e-3 with 2.3 of them, 3.1e-3 with 5.3 and
2.7e-3 with 14. The narrower matrices of a model have more, so with few of them bits go to the
wrong ones.
"""

_MEASURED_EVERY: Final = 4
"""One sample of so many is not fitted; losses are measured on it.

More than of the calibration itself: the tokens are fewer, and weighted by their gradients few of
them count.
"""


@dataclass(frozen=True)
class Plan:
    """Decisions per linear, by full name.

    Attributes:
        schemes: scheme of each linear to quantise.
        tokens: float32 [samples, tokens], mean 1: how much each token counts in the Hessian. Empty:
            1 each.
        rows: float32 [N], mean 1: how much each output feature counts in the sidecar's fit. Empty:
            1 each.
    """

    schemes: Mapping[str, ConfigGroup]
    tokens: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rows: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def groups(self) -> dict[str, ConfigGroup]:
        """A config group per scheme that lists its linears, the most frequent scheme first."""
        members: dict[ConfigGroup, list[str]] = {}
        for name, scheme in self.schemes.items():
            members.setdefault(scheme, []).append(name)
        ordered = sorted(members.items(), key=lambda item: -len(item[1]))
        return {
            f"group_{number}": scheme.model_copy(update={"targets": tuple(names)})
            for number, (scheme, names) in enumerate(ordered)
        }

    def save(self, path: Path) -> None:
        """Write the plan to a safetensors file, atomically."""
        # Shared weightings are stored once, and are shared again when loaded.
        owners: dict[int, str] = {}
        tokens = {name: owners.setdefault(id(tensor), name) for name, tensor in self.tokens.items()}
        tensors = {f"{name}:tokens": self.tokens[name] for name in owners.values()}
        tensors |= {f"{name}:rows": tensor for name, tensor in self.rows.items()}
        schemes = {name: scheme.model_dump(mode="json") for name, scheme in self.schemes.items()}
        write_tensors(path, tensors, {"schemes": json.dumps(schemes), "tokens": json.dumps(tokens)})

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read what :meth:`save` wrote."""
        tokens: dict[str, torch.Tensor] = {}
        rows: dict[str, torch.Tensor] = {}
        reader = ShardedReader(path.parent, shards=[path.name])
        for key in reader.names:
            name, _, kind = key.rpartition(":")
            (tokens if kind == "tokens" else rows)[name] = reader.read(key)
        metadata = reader.metadata(path.name)
        schemes, owners = (json.loads(metadata[key]) for key in ("schemes", "tokens"))
        tokens = {name: tokens[owner] for name, owner in owners.items()}
        return cls(
            {name: ConfigGroup.model_validate(scheme) for name, scheme in schemes.items()},
            tokens,
            rows,
        )


def uniform_schemes(
    source: ModelSource, config: SvskCheckpointConfig, scale_dtype: torch.dtype
) -> dict[str, ConfigGroup]:
    """Scheme of each linear of the decoder blocks that a config quantises, by full name.

    Raises:
        SvskError: a linear's weight is not stored as one matrix of its own.
        SvskFormatError: a linear does not fit its scheme.
    """
    schemes: dict[str, ConfigGroup] = {}
    for full, linear in source.block_linears().items():
        scheme = config.scheme_for(full)
        if scheme is not None:
            source.check_quantizable(full)
            # Only to raise where the matrix does not fit its scheme.
            LinearSpec(full, linear.out_features, linear.in_features, scheme, scale_dtype)
            schemes[full] = scheme
    return schemes


def make_plan(
    source: ModelSource,
    schemes: Mapping[str, ConfigGroup],
    recipe: Recipe,
    calibration: CalibrationSet,
    device: torch.device,
    scale_dtype: torch.dtype,
    scratch: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Decide on every linear.

    Args:
        source: the dense model.
        schemes: of the linears to quantise, without a bit budget.
        recipe: how.
        calibration: text.
        device: where to compute.
        scale_dtype: stored dtype of scales.
        scratch: folder for temporary files.
        progress: called with the steps done and their total, where anything is measured.
        say: is told how many tokens losses are measured with.

    Raises:
        SvskError: the budget is less than the smallest choices take, or the gradients are not
            finite.
    """
    if not (isinstance(recipe, AlternatingRecipe) and recipe.needs_gradients):
        return Plan(schemes)
    count = None if recipe.gradients.token_power else recipe.gradients.samples
    if recipe.allocation is None:
        texts, order, held = calibration.subset(count), None, 0
    else:
        texts = calibration.subset(_enough_samples(source, schemes, count, calibration, say))
        order, held = split_order(len(texts.tokens), _MEASURED_EVERY)
        texts = replace(texts, tokens=texts.tokens[order], parts=())
    measured = _Measured(source, recipe, schemes, scale_dtype, order)
    sweep_gradients(
        source,
        texts,
        device,
        block_dtype(device),
        measured.visit,
        full=recipe.allocation is not None,
        held_out=held,
        seed=recipe.calibration.seed,
        scratch=scratch,
        progress=progress,
    )
    return measured.plan()


def _enough_samples(
    source: ModelSource,
    schemes: Mapping[str, ConfigGroup],
    wanted: int | None,
    calibration: CalibrationSet,
    say: Callable[[str], None],
) -> int:
    """Samples for the losses of a bit budget: more than asked for where matrices are wide."""
    available, seq_len = calibration.tokens.shape
    widest = max(source.tensors.describe(f"{name}.weight").shape[1] for name in schemes)
    # Those that are measured on come on top.
    fitted = -(-_TOKENS_PER_WIDTH * widest // seq_len)
    enough = -(-fitted * _MEASURED_EVERY // (_MEASURED_EVERY - 1))
    least = available if wanted is None else wanted
    count = min(available, max(least, enough))
    if count > least:
        say(
            f"Losses are measured on {count} samples instead of {least}: {_TOKENS_PER_WIDTH} tokens"
            f" to fit for each of {widest} input features, and one sample in {_MEASURED_EVERY} to"
            " measure on"
        )
    if count < enough:
        say(
            f"Losses are measured on {count} samples of {seq_len} tokens, which is all there are;"
            f" {enough} would give {_TOKENS_PER_WIDTH} tokens to fit for each of {widest} input"
            " features"
        )
    return count


@dataclass
class _Measured:
    """Takes in the gradients of one block after the other."""

    source: ModelSource
    recipe: AlternatingRecipe
    schemes: Mapping[str, ConfigGroup]
    scale_dtype: torch.dtype
    order: torch.Tensor | None  # of the samples in the sweep; None as they are
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    choices: dict[str, list[Choice]] = field(default_factory=dict)

    def visit(
        self,
        index: int,
        block: nn.Module,
        gradients: Mapping[str, OutputGradients],
        fitted: dict[str, InputStatistics],
        held_out: dict[str, InputStatistics],
    ) -> None:
        """Note what one block's gradients say; the statistics are used up."""
        args = self.recipe.gradients
        for name, full, linear in self.source.linears(index):
            if full not in self.schemes:
                continue
            if name not in gradients:
                raise SvskError(
                    f"{full}: the model's output does not depend on it. Add it to --ignore."
                )
            gradient = gradients[name]
            if args.token_power:
                squares = gradient.tokens
                if self.order is not None:
                    squares = squares[self.order.argsort()]
                self.tokens[full] = _relative(squares, args.token_power)
            if args.row_power:
                self.rows[full] = _relative(gradient.rows, args.row_power).cpu()
            if self.recipe.allocation is not None:
                # Now, while the block's statistics are in memory: one block's at a time are.
                weight = self.source.tensors.read(f"{full}.weight").to(gradient.rows.device).float()
                spec = LinearSpec(
                    full,
                    linear.out_features,
                    linear.in_features,
                    self.schemes[full],
                    self.scale_dtype,
                )
                try:
                    self.choices[full] = choices_of(
                        weight,
                        fitted.pop(name).hessian,
                        gradient.rows,
                        spec,
                        self.recipe.alternating,
                        self.recipe.allocation,
                        held_out.pop(name).hessian if name in held_out else None,
                    )
                except SvskError as error:
                    raise SvskError(f"{full}: {error}") from error
        if args.shared:
            self._share(index)

    def plan(self) -> Plan:
        """What all blocks together say."""
        if self.recipe.allocation is None:
            return Plan(self.schemes, self.tokens, self.rows)
        weights = sum(self._size(name) for name in self.schemes)
        fused: dict[str, tuple[str, ...]] = {name: (name,) for name in self.schemes}
        for members in vllm_class_of(self.source).fused_sets(self.schemes):
            fused |= dict.fromkeys(members, members)
        chosen = allocate(self.choices, fused, self.recipe.allocation.target_bpw, weights)
        schemes = {
            name: scheme_with(scheme, pick.base, pick.rank, pick.factor_bits)
            for name, scheme in self.schemes.items()
            for pick in (chosen[name],)
        }
        return Plan(schemes, self.tokens, self.rows)

    def _size(self, name: str) -> int:
        n, k = self.source.tensors.describe(f"{name}.weight").shape
        return n * k

    def _share(self, index: int) -> None:
        """Give linears of one input one token weighting, the mean of theirs."""
        linears = [full for _, full, _ in self.source.linears(index)]
        for names in vllm_class_of(self.source).fused_sets(linears):
            weightings = [self.tokens[name] for name in names if name in self.tokens]
            if weightings:
                # One weighting, so one Hessian for all: none of them may decide it alone.
                mean = torch.stack(weightings).mean(0)
                self.tokens.update(dict.fromkeys(names, mean))


def _relative(squares: torch.Tensor, power: float) -> torch.Tensor:
    """Powers of squared gradients over their mean, float32; 1 where all are zero."""
    # Squares of the gradients of a whole text are small enough to underflow in float32.
    powers = squares.double() ** power
    mean = powers.mean()
    return (powers / mean if mean else torch.ones_like(powers)).float()
