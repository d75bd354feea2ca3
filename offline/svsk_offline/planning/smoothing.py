# SPDX-License-Identifier: Apache-2.0
"""Smoothing: scales of activations moved into weights, before anything is quantised.

Channel j of a linear's input is divided by ``max|x_j| ** alpha / max|W_j| ** (1 - alpha)``, W_j the
weights that read it, and its weights multiplied (SmoothQuant, Xiao et al. 2022; the first half of
SVDQuant, Li et al. 2024). Or only its outliers are: those over a multiple of the median channel are
brought down to that, by a factor of 4 at most, which leaves nearly all weights as they are. A
rotary pair of keys is divided by a factor that makes its rounding cost attention least, and queries
are multiplied.

Factors of inputs are rounded to powers of two, so that nothing is rounded by them. Those of keys
are rounded to eighths of an octave: a key cache's step follows the largest channel, and whole
octaves would leave the channels of a head up to twice as far apart as they need be. Each is kept
only where the block, scaled by powers of two, gives the same bits as before on a calibration
sample.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import nn

from svsk_offline.calibration import BlockRunner, CalibrationSet
from svsk_offline.calibration.channel_maxima import collect_maxima
from svsk_offline.planning.fold_pairs import (
    InputPair,
    KeyPair,
    Pair,
    Part,
    input_pairs,
    key_pairs,
    key_writers,
    query_writer,
)
from svsk_offline.planning.key_channels import KeyChannels
from svsk_offline.planning.key_search import Attention, search_exponents, seen_attention
from svsk_offline.precision import block_dtype
from svsk_offline.recipe_sections import SmoothingArgs
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.fold import LARGEST_EXPONENT, Fold, to_steps
from svsk_offline.storage.inspection import smoothing_lines
from svsk_vllm.kv_cache.rounding import BLOCK

__all__ = [
    "Smoothing",
    "key_exponents",
    "outlier_exponents",
    "plan_smoothing",
    "smoothing_exponents",
]

_P = TypeVar("_P", bound=Pair)

_SAMPLES: Final = 64
"""Calibration samples whose largest magnitudes are taken: with more they hardly grow."""

_OUTLIERS: Final = 2
"""Exponent of two of the most that an outlier is divided by.

A column that grows more takes the scale of its whole group with it, while the few tokens that have
such an outlier are all that gain (docs/benchmarks/smoothing.md).
"""

_SEARCHED: Final = 4
"""Of these, the samples whose attention tells the factors of keys."""

_CHANGED: Final = (
    "scaling it changes what the block computes, as with norms of 1 + weight or where a"
    " nonlinearity is between"
)
_SHARED: Final = "its weights are not stored for it alone"
_OTHER_BLOCKS: Final = "other blocks read its keys and values"


@dataclass(frozen=True)
class Smoothing:
    """What is folded into a model.

    Attributes:
        fold: the factors.
        folded: how many inputs, or layers of keys, by kind.
        left: how many linears are left alone, by ``name below the block: reason``.
        keys: of each layer with keys that was looked at, in order.
    """

    fold: Fold
    folded: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)
    keys: tuple[KeyChannels, ...] = ()

    def record(self) -> dict[str, Any]:
        """What goes into ``producer.smoothing``."""
        record: dict[str, Any] = {"folded": dict(self.folded)}
        if self.left:
            record["left_alone"] = dict(self.left)
        if self.keys:
            record["keys"] = [channels.to_json() for channels in self.keys]
        return record

    def lines(self) -> list[str]:
        """The same in sentences."""
        lines = smoothing_lines(self.record())
        worst = max(self.keys, key=lambda channels: channels.ratio, default=None)
        if worst is not None and worst.folded_ratio is not None:
            lines.append(
                f"smoothing of keys: largest over median channel {worst.ratio:.1f} in block"
                f" {worst.block}, {worst.folded_ratio:.1f} with the factors folded in"
            )
        return lines

    def save(self, path: Path) -> None:
        """Write it to a safetensors file, atomically."""
        self.fold.save(path, {"record": json.dumps(self.record())})

    @classmethod
    def load(cls, path: Path) -> "Smoothing":
        """Read what :meth:`save` wrote.

        Raises:
            SvskFormatError: the file is damaged.
        """
        fold, metadata = Fold.load(path)
        record = json.loads(metadata["record"])
        keys = tuple(KeyChannels(**row) for row in record.get("keys", ()))
        return cls(fold, record["folded"], record.get("left_alone", {}), keys)


def smoothing_exponents(maxima: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """Exponents of two of ``max|x| ** alpha / max|W| ** (1 - alpha)``, of mean about 0.

    Args:
        maxima: float32 [factors], largest magnitudes of the activations.
        weights: the same of the weights that read them.
        alpha: how much of the scale moves into the weights.

    Returns:
        int8 [factors]; 0 where either is 0, as for a channel that no token uses.
    """
    logs = alpha * maxima.log2() - (1 - alpha) * weights.log2()
    used = ((maxima > 0) & (weights > 0)).unsqueeze(0)
    return _centred(logs.unsqueeze(0), used).round().to(torch.int8)


def outlier_exponents(maxima: torch.Tensor, above: float) -> torch.Tensor:
    """Exponents of two that bring channels down to a multiple of the median one, or towards it.

    Args:
        maxima: float32 [factors], largest magnitudes of the activations.
        above: the multiple.

    Returns:
        int8 [factors], 0 to 2; 0 too for a channel that no token uses, which the median does not
        count either.
    """
    used = maxima > 0
    median = maxima[used].median() if used.any() else maxima.new_ones(())
    logs = (maxima / (above * median)).log2().where(used, 0)
    return logs.clamp(0, _OUTLIERS).round().to(torch.int8)


def key_exponents(factors: torch.Tensor, heads: int) -> torch.Tensor:
    """Exponents of two of what keys are divided by, of mean about 0 in each head.

    Args:
        factors: float32 [factors], those of each head together; 0 for keys that are always 0.
        heads: how many.

    Returns:
        float32 [factors], multiples of an eighth.
    """
    rows = factors.view(heads, -1)
    return to_steps(_centred(rows.log2(), rows > 0))


def _centred(logs: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Logarithms less the mean of the used ones of each row, 0 for the others, flattened."""
    logs = logs.where(used, 0)
    mean = logs.sum(1, keepdim=True) / used.sum(1, keepdim=True).clamp(min=1)
    exponents = (logs - mean).where(used, 0)
    return exponents.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).flatten()


def plan_smoothing(
    source: ModelSource,
    texts: CalibrationSet,
    args: SmoothingArgs,
    device: torch.device,
    scratch: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Smoothing:
    """Run calibration samples through a model once, and choose the factors of each block.

    Args:
        source: the dense model, not folded.
        texts: the samples; at most :data:`_SAMPLES` of them are used.
        args: what to smooth, and how much.
        device: where to compute.
        scratch: folder for temporary files.
        progress: called with the number of blocks done and their total.
    """
    dtype = block_dtype(device)
    runner = BlockRunner(source, texts.subset(_SAMPLES), device, dtype, scratch=scratch)
    planner = _Planner(source, runner, args)
    name, blocks = source.blocks
    try:
        for index, block in enumerate(blocks):
            source.load(block, f"{name}.{index}.", dtype, device)
            planner.block(index, block)
            source.unload(block)
            progress(index + 1, len(blocks))
    finally:
        runner.close()
    return planner.result()


def _key_exponents(pair: KeyPair, attention: Attention | None) -> torch.Tensor:
    """What keys are divided by: searched for where attention was seen, else by the formula."""
    exponents = key_exponents(pair.even, pair.heads)
    if attention is None or len(pair.channel) % BLOCK:
        return exponents
    rows = exponents.view(pair.heads, -1)
    return search_exponents(attention, rows, pair.channel).flatten()


class _Planner:
    """Chooses factors block by block."""

    def __init__(self, source: ModelSource, runner: BlockRunner, args: SmoothingArgs) -> None:
        self._source, self._runner, self._args = source, runner, args
        model: Any = source.model
        self._config = model.config.get_text_config()
        self._users = Counter(source.map.sources.values())
        self._axes: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
        self._folded: Counter[str] = Counter()
        self._left: Counter[str] = Counter()
        self._keys: list[KeyChannels] = []

    def result(self) -> Smoothing:
        return Smoothing(Fold(*self._axes), self._folded, self._left, tuple(self._keys))

    @torch.no_grad()
    def block(self, index: int, block: nn.Module) -> None:
        """Choose the factors of a loaded block; its samples move on, its weights are scaled."""
        runner, args = self._runner, self._args
        sample = runner.hidden[:1].clone()
        expected = runner.forward(index, block, sample)
        writers = key_writers(block) if args.keys else {}
        # Before the samples move on.
        attention = {key: self._attention(index, block, key) for key in writers.values()}
        outputs = {one for key in writers.values() for one in (key, query_writer(key))}
        modules = dict(block.named_modules())
        found = collect_maxima(runner, index, block, [one for one in outputs if one in modules])

        def fits() -> bool:
            return torch.equal(runner.forward(index, block, sample), expected)

        if args.inputs:
            pairs, left = input_pairs(block, found, self._head_dim(block))
            for read in pairs:
                if read.kind in args.targets:
                    self._try(index, block, [(read, self._exponents(read))], fits)
            self._left.update(f"{name}: {reason}" for name, reason in left.items())
        for writer in writers.values():
            dims = self._head_dim(block), self._rotary_dim(block)
            ways = (
                "its heads are of unknown size"
                if dims[0] is None
                else key_pairs(block, found, writer, dims[0], dims[1] or dims[0])
            )
            if isinstance(ways, str):
                self._left[f"{writer}: {ways}"] += 1
                continue
            # One after the other: a search for a layout that is not the block's would be in vain.
            chosen = ((pair, _key_exponents(pair, attention[writer])) for pair in ways)
            done = self._try(index, block, chosen, fits)
            pair, exponents = (ways[0], None) if done is None else done
            self._keys.append(KeyChannels.of(index, pair.maxima, pair.heads, exponents))

    def _attention(self, index: int, block: nn.Module, writer: str) -> Attention | None:
        """What the attention layer of a module that writes keys is given."""
        runner = self._runner
        samples = runner.hidden[:_SEARCHED].split(1)
        runs = [partial(runner.forward, index, block, sample) for sample in samples]
        return seen_attention(block, block.get_submodule(writer.rpartition(".")[0]), runs)

    def _exponents(self, pair: InputPair) -> torch.Tensor:
        """Of a pair that scales inputs, by the rule that the arguments name."""
        if self._args.above is not None:
            return outlier_exponents(pair.maxima, self._args.above)
        assert self._args.alpha is not None
        return smoothing_exponents(pair.maxima, pair.weights, self._args.alpha)

    def _try(
        self,
        index: int,
        block: nn.Module,
        ways: Iterable[tuple[_P, torch.Tensor]],
        fits: Callable[[], bool],
    ) -> tuple[_P, torch.Tensor] | None:
        """Take the first way that leaves the block's output as it is; None if there is none."""
        reason = _CHANGED
        name = ""
        for pair, exponents in ways:
            name = pair.name
            stored = [self._stored(index, part) for part in pair.parts]
            if None in stored:
                reason = _SHARED
                break
            # Nothing of this block tells what another makes of them.
            if pair.kind in ("keys", "o") and getattr(self._config, "num_kv_shared_layers", None):
                reason = _OTHER_BLOCKS
                break
            before = pair.apply(block, exponents.round().to(torch.int8))
            if fits():
                if exponents.is_floating_point():
                    pair.undo(block, before)
                    pair.apply(block, exponents)
                for part, tensor in zip(pair.parts, stored, strict=True):
                    self._note(str(tensor), part.axis, part.exponents(exponents))
                self._folded[pair.kind] += 1
                return pair, exponents
            pair.undo(block, before)
        self._left[f"{name}: {reason}"] += 1
        return None

    def _note(self, tensor: str, axis: int, exponents: torch.Tensor) -> None:
        """Add exponents to those that a tensor has."""
        exponents = exponents.cpu()
        noted = self._axes[axis]
        noted[tensor] = noted[tensor] + exponents if tensor in noted else exponents

    def _stored(self, index: int, part: Part) -> str | None:
        """The tensor that fills a parameter of a block, and nothing else."""
        tensors = self._source.map
        parameter = f"{self._source.blocks[0]}.{index}.{part.parameter}"
        stored = tensors.sources.get(parameter)
        alone = stored is not None and tensors.targets(stored) == (parameter,)
        return stored if alone and self._users[stored or ""] == 1 else None

    def _head_dim(self, block: nn.Module) -> int | None:
        """Channels of an attention head: what the module says, or else the config."""
        for module in block.modules():
            if isinstance(size := getattr(module, "head_dim", None), int):
                return size
        config = self._config
        heads, hidden = (
            getattr(config, key, None) for key in ("num_attention_heads", "hidden_size")
        )
        own = getattr(config, "head_dim", None)
        return own or (hidden // heads if heads and hidden else None)

    def _rotary_dim(self, block: nn.Module) -> int | None:
        """Channels of a head that rotary turns, None for all."""
        config = self._config
        rope = getattr(config, "rope_parameters", None)
        share = getattr(config, "partial_rotary_factor", None)
        if share is None and isinstance(rope, dict):
            share = rope.get("partial_rotary_factor")
        size = self._head_dim(block)
        return int(size * share) if size and isinstance(share, float | int) else None
