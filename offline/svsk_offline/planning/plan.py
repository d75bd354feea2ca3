# SPDX-License-Identifier: Apache-2.0
"""What is decided about every linear before any is quantised.

Its scheme, and what its tokens and rows count.

Without a bit budget and without gradient weights there is nothing to measure. With either, one
sweep of the loss's gradient over the calibration text gives both
(:mod:`svsk_offline.planning.measurements`).
"""

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from svsk_offline.calibration import CalibrationSet
from svsk_offline.calibration.room import UNLIMITED, Room
from svsk_offline.planning.bit_budget import Choice, allocate
from svsk_offline.planning.error_curves import ErrorCurve, scheme_with
from svsk_offline.planning.measured import metric_tensors, stored_metrics
from svsk_offline.planning.measurements import Measuring, measure_once
from svsk_offline.planning.serving import vllm_class_of
from svsk_offline.quantizers.row_metric import RowMetric
from svsk_offline.recipe import AllocationArgs, AlternatingRecipe, Recipe
from svsk_offline.storage.atomic import write_tensors
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.world import ALONE, World
from svsk_vllm.format import ConfigGroup, LinearSpec, ShardedReader, SvskCheckpointConfig
from svsk_vllm.format.experts import ExpertName, expert_layers, projection_pattern

__all__ = ["Plan", "make_plan", "uniform_schemes"]


@dataclass(frozen=True)
class Plan:
    """Decisions per linear, by full name.

    Attributes:
        schemes: scheme of each linear to quantise.
        tokens: float32 [samples, tokens], mean 1: how much each token counts in the Hessian. Empty:
            1 each.
        rows: how much errors of output features count in the sidecar's fit, of mean 1. Empty: 1
            each.
    """

    schemes: Mapping[str, ConfigGroup]
    tokens: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rows: Mapping[str, RowMetric] = field(default_factory=dict)

    def token_weights(self, names: Mapping[str, str]) -> dict[str, torch.Tensor] | None:
        """Token weights of a block's linears; those that stay dense get the first one's.

        Args:
            names: of the block's linears, full name by another.

        Returns:
            By that other name; None where all tokens count the same.
        """
        weights = {name: self.tokens[full] for name, full in names.items() if full in self.tokens}
        first = next(iter(weights.values()), None)
        return None if first is None else {name: weights.get(name, first) for name in names}

    def groups(self) -> dict[str, ConfigGroup]:
        """A config group per scheme that lists its linears, the most frequent scheme first."""
        members: dict[ConfigGroup, list[str]] = {}
        for name, scheme in self.schemes.items():
            members.setdefault(scheme, []).append(name)
        ordered = sorted(members.items(), key=lambda item: -len(item[1]))
        return {
            f"group_{number}": scheme.model_copy(update={"targets": _targets(names)})
            for number, (scheme, names) in enumerate(ordered)
        }

    def save(self, path: Path) -> None:
        """Write the plan to a safetensors file, atomically."""
        # Shared weightings are stored once, and are shared again when loaded.
        owners: dict[int, str] = {}
        tokens = {name: owners.setdefault(id(tensor), name) for name, tensor in self.tokens.items()}
        tensors = {f"{name}:tokens": self.tokens[name] for name in owners.values()}
        tensors |= metric_tensors(self.rows)
        schemes = {name: scheme.model_dump(mode="json") for name, scheme in self.schemes.items()}
        write_tensors(path, tensors, {"schemes": json.dumps(schemes), "tokens": json.dumps(tokens)})

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read what :meth:`save` wrote."""
        tokens: dict[str, torch.Tensor] = {}
        others: dict[str, torch.Tensor] = {}
        reader = ShardedReader(path.parent, shards=[path.name])
        for key in reader.names:
            name, _, kind = key.rpartition(":")
            if kind == "tokens":
                tokens[name] = reader.read(key)
            else:
                others[key] = reader.read(key)
        metadata = reader.metadata(path.name)
        schemes, owners = (json.loads(metadata[key]) for key in ("schemes", "tokens"))
        tokens = {name: tokens[owner] for name, owner in owners.items()}
        return cls(
            {name: ConfigGroup.model_validate(scheme) for name, scheme in schemes.items()},
            tokens,
            stored_metrics(others),
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
    kept: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
    world: World = ALONE,
    room: Room = UNLIMITED,
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
        kept: folder that keeps what is measured; what it holds is not measured again. None keeps
            nothing.
        progress: called with the steps done and their total, where anything is measured.
        say: is told what is measured, and with how many tokens.
        world: the processes that measure together. The leading one decides; what the others get
            stands for nothing where anything is measured.
        room: what may be held at a time.

    Raises:
        SvskError: the budget is less than the smallest choices take, the gradients are not finite,
            or another run measures for ``kept``.
    """
    if not (isinstance(recipe, AlternatingRecipe) and recipe.needs_gradients):
        return Plan(schemes)
    measuring = Measuring.of(source, schemes, recipe, calibration, device, scale_dtype, say, world)
    found = measure_once(measuring, kept, scratch, progress, say, room)
    if not world.leads:
        return Plan(schemes)
    args = recipe.gradients
    tokens, rows = (
        {name: _relative(squares[name], power) for name in schemes} if power else {}
        for squares, power in ((found.tokens, args.token_power), (found.rows, args.row_power))
    )
    metrics = {name: RowMetric.diagonal(weights) for name, weights in rows.items()} | found.metrics
    if args.shared:
        _share(source, tokens)
    if recipe.allocation is not None:
        curves = found.curves
        schemes = _within_budget(source, schemes, curves, recipe, recipe.allocation, scale_dtype)
    return Plan(schemes, tokens, metrics)


def _within_budget(
    source: ModelSource,
    schemes: Mapping[str, ConfigGroup],
    curves: Mapping[str, ErrorCurve],
    recipe: AlternatingRecipe,
    allocation: AllocationArgs,
    scale_dtype: torch.dtype,
) -> dict[str, ConfigGroup]:
    """The schemes that a bit budget gives, by what was measured of the matrices.

    One matrix of all experts of a layer is chosen for as one.
    """
    choices: dict[str, list[Choice]] = {}
    weights = 0
    shared = {name: names[0] for names in expert_layers(schemes).values() for name in names}
    for name, scheme in schemes.items():
        n, k = source.tensors.describe(f"{name}.weight").shape
        spec = LinearSpec(name, n, k, scheme, scale_dtype)
        own = curves[name].choices(spec, recipe.alternating.rounds, allocation)
        first = shared.get(name, name)
        choices[first] = (
            [a + b for a, b in zip(choices[first], own, strict=True)] if (first in choices) else own
        )
        weights += spec.num_weights
    fused: dict[str, Hashable] = {name: (name,) for name in choices}
    for members in vllm_class_of(source).fused_sets(schemes):
        fused |= dict.fromkeys(members, members)
    for name in shared.values():
        expert = ExpertName.of(name)
        fused[name] = expert and expert.base
    chosen = allocate(choices, fused, allocation.target_bpw, weights)
    return {
        name: scheme_with(scheme, pick.base, pick.rank, pick.factor_bits)
        for name, scheme in schemes.items()
        for pick in (chosen[shared.get(name, name)],)
    }


def _targets(names: Sequence[str]) -> tuple[str, ...]:
    """Targets of a config group: the names, experts by a pattern for all of a layer."""
    layers = expert_layers(names)
    experts = {name for members in layers.values() for name in members}
    patterns = (projection_pattern(*key) for key in layers)
    return (*(name for name in names if name not in experts), *patterns)


def _share(source: ModelSource, tokens: dict[str, torch.Tensor]) -> None:
    """Give linears of one input one token weighting, the mean of theirs, in place."""
    for names in vllm_class_of(source).fused_sets(source.block_linears()):
        weightings = [tokens[name] for name in names if name in tokens]
        if weightings:
            # One weighting, so one Hessian for all: none of them may decide it alone.
            mean = torch.stack(weightings).mean(0)
            tokens.update(dict.fromkeys(names, mean))


def _relative(squares: torch.Tensor, power: float) -> torch.Tensor:
    """Powers of squared gradients over their mean, float32; 1 where all are zero."""
    # Squares of the gradients of a whole text are small enough to underflow in float32.
    powers = squares.double() ** power
    mean = powers.mean()
    return (powers / mean if mean else torch.ones_like(powers)).float()
