# SPDX-License-Identifier: Apache-2.0
"""Quantising a model: one decoder block at a time, from a dense folder to an SVSK checkpoint.

Shards are written per block into ``OUT.partial``, which becomes ``OUT`` when everything is there. A run that was
interrupted continues after the last finished block when it is started again with the same inputs, and writes the same
bytes: the hidden states are computed again, blocks with a shard are not quantised again.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import nn

from svsk_offline.atomic import PartialFolder, write_json, write_tensors, write_text
from svsk_offline.calibration import BlockRunner, InputStatistics, load_calibration
from svsk_offline.calibration.text import DEFAULT_SOURCE, CalibrationSet
from svsk_offline.card import model_card
from svsk_offline.errors import SvskError
from svsk_offline.layer import LayerReport, quantize_linear
from svsk_offline.recipe import Recipe, load_recipe
from svsk_offline.source import ModelSource, linear_modules, resolve_model
from svsk_vllm.format import ConfigGroup, LinearSpec, SvskCheckpointConfig
from svsk_vllm.format.shards import INDEX_NAME, read_json
from svsk_vllm.version import __version__

__all__ = ["Progress", "QuantizationResult", "quantize", "resolve_device"]

_STATE_NAME: Final = "svsk-state.json"
_COPIED: Final = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")
_NOT_COPIED: Final = ("config.json", INDEX_NAME, _STATE_NAME)


@dataclass
class Progress:
    """Callbacks of a run; the default ones do nothing."""

    message: Callable[[str], None] = lambda text: None
    block: Callable[[int, int], None] = lambda index, total: None
    layer: Callable[[LayerReport], None] = lambda report: None


@dataclass(frozen=True)
class QuantizationResult:
    """What a run did."""

    folder: Path
    layers: list[LayerReport]
    block_seconds: list[float] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of all quantised linears over their weights."""
        return sum(layer.stored_bits for layer in self.layers) / sum(layer.num_weights for layer in self.layers)


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | str = "best",
    *,
    calibration: str = DEFAULT_SOURCE,
    chat_template: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizationResult:
    """Quantise a dense Hugging Face model into an SVSK checkpoint.

    Args:
        model: folder or hub name.
        out: folder to write.
        recipe: a recipe, or the name or file of one.
        calibration: text source, see :func:`svsk_offline.calibration.load_calibration`.
        chat_template: render question and answer rows as chat messages.
        device: ``auto``, ``cpu``, ``cuda`` ...
        dtype: dtype of scales and unquantised tensors, ``auto`` for the model's own.
        overwrite: replace ``out``, and drop an unfinished run with other inputs.
        progress: callbacks.

    Raises:
        SvskError: something about the request that the user can mend.
        SvskFormatError: the model folder is damaged, or a layer does not fit the format.
    """
    progress = progress or Progress()
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    source = ModelSource(resolve_model(str(model)))
    folder = PartialFolder(Path(out), source.folder, overwrite=overwrite)
    torch_device = resolve_device(device)
    scale_dtype = source.model_dtype(dtype)
    args = recipe.calibration
    progress.message(f"Calibration text: {calibration}, {args.samples} samples of {args.seq_len} tokens")
    texts = load_calibration(
        calibration, source.tokenizer, args.samples, args.seq_len, args.seed, chat_template=chat_template
    )
    run = _Run(source, folder, recipe, texts, torch_device, scale_dtype, progress)
    return run.execute(overwrite)


def resolve_device(name: str) -> torch.device:
    """Device by name, ``auto`` for CUDA where there is one.

    Raises:
        SvskError: torch cannot use it here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SvskError(f"--device {name}: not usable here ({str(error).splitlines()[0]}).") from error
    return device


class _Run:
    """State of one quantisation."""

    def __init__(
        self,
        source: ModelSource,
        folder: PartialFolder,
        recipe: Recipe,
        texts: CalibrationSet,
        device: torch.device,
        scale_dtype: torch.dtype,
        progress: Progress,
    ) -> None:
        self.source, self.folder, self.recipe, self.texts = source, folder, recipe, texts
        self.device, self.scale_dtype, self.progress = device, scale_dtype, progress
        self.blocks_name, self.blocks = source.blocks
        self.config = self._checkpoint_config()
        self._check_targets()

    def execute(self, overwrite: bool) -> QuantizationResult:
        """Write all shards, then the rest of the folder."""
        partial = self.folder.create()
        self._claim(partial, overwrite)
        layers, seconds = self._write_blocks(partial)
        self._write_rest(partial)
        self._finish(partial, layers)
        return QuantizationResult(self.folder.commit(), layers, seconds)

    def _checkpoint_config(self) -> SvskCheckpointConfig:
        recipe = self.recipe
        group = ConfigGroup(targets=("Linear",), weights=recipe.weights, sidecar=recipe.sidecar)
        producer = {
            "svsk": __version__,
            "recipe": recipe.name,
            "recipe_hash": recipe.digest,
            "recipe_values": recipe.model_dump(mode="json", exclude={"name", "description"}),
            "calibration": self.texts.describe(),
        }
        inside = {f"{self.blocks_name}.{index}.{name}" for index, name in self._linear_names()}
        # Linears outside the decoder blocks (an output head, say) stay as they are, so the config must say so.
        outside = [name for name, _ in linear_modules(self.source.model) if name not in inside]
        ignore = dict.fromkeys((*recipe.ignore, *outside))
        return SvskCheckpointConfig(config_groups={"group_0": group}, ignore=tuple(ignore), producer=producer)

    def _linear_names(self) -> Iterator[tuple[int, str]]:
        for index, block in enumerate(self.blocks):
            for name, _ in linear_modules(block):
                yield index, name

    def _check_targets(self) -> None:
        """Refuse before any work what would fail in the middle."""
        for name in self.source.tensors.names:
            self.source.is_stored(name)  # raises on a tensor that the model class does not know
        count = 0
        for index, block in enumerate(self.blocks):
            for name, linear in linear_modules(block):
                full = f"{self.blocks_name}.{index}.{name}"
                scheme = self.config.scheme_for(full)
                if scheme is not None:
                    LinearSpec(full, linear.out_features, linear.in_features, scheme, self.scale_dtype)
                    count += 1
        if not count:
            raise SvskError(f"{self.source.folder}: every linear layer is on the ignore list; nothing to quantise.")

    def _claim(self, partial: Path, overwrite: bool) -> None:
        """Note what this run is, or check that the unfinished one found is the same."""
        shards = [[name, self.source.tensors.shard_of(name)] for name in self.source.tensors.names]
        identity = {
            "model": hashlib.sha256(json.dumps([self.source.config_dict, shards], sort_keys=True).encode()).hexdigest(),
            "files": sorted(
                (path.name, (found := path.stat()).st_size, found.st_mtime_ns)
                for path in self.source.folder.glob("*.safetensors")
            ),
            "device": self.device.type,
            "config": self.config.to_dict(),
            "dtype": str(self.scale_dtype),
        }
        identity = json.loads(json.dumps(identity))
        state = partial / _STATE_NAME
        unknown = not state.exists() and any(partial.iterdir())
        if unknown or (state.exists() and read_json(state) != identity):
            if not overwrite:
                raise SvskError(
                    f"{partial} holds an unfinished run of another model, recipe, calibration or device, or "
                    "something else. Delete it, or pass --overwrite."
                )
            self.folder.discard()
            self.folder.create()
        write_json(state, identity)

    def _shard_path(self, partial: Path, number: int) -> Path:
        """Shard of block ``number - 1``; number 0 is everything outside the blocks."""
        return partial / f"model-{number + 1:05d}-of-{len(self.blocks) + 1:05d}.safetensors"

    def _write_blocks(self, partial: Path) -> tuple[list[LayerReport], list[float]]:
        compute = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        runner = BlockRunner(self.source, self.texts, self.device, compute, scratch=partial)
        layers: list[LayerReport] = []
        seconds: list[float] = []
        try:
            for index, block in enumerate(self.blocks):
                started = time.perf_counter()
                shard = self._shard_path(partial, index + 1)
                reports = shard.with_suffix(".report.json")
                done = shard.exists() and reports.exists()
                self.source.load(block, f"{self.blocks_name}.{index}.", compute, self.device)
                statistics = runner.run(index, block, collect=not done, full=self.recipe.needs_hessians)
                if done:
                    self.progress.message(f"Block {index}: finished by an earlier run")
                    found = [LayerReport(**row) for row in read_json(reports)["layers"]]
                else:
                    found = self._write_block(shard, index, block, statistics)
                    write_json(reports, {"layers": [asdict(report) for report in found]})
                self.source.unload(block)
                layers += found
                seconds.append(time.perf_counter() - started)
                self.progress.block(index + 1, len(self.blocks))
        finally:
            runner.close()
        return layers, seconds

    def _write_block(
        self, shard: Path, index: int, block: nn.Module, statistics: dict[str, InputStatistics]
    ) -> list[LayerReport]:
        prefix = f"{self.blocks_name}.{index}."
        tensors: dict[str, torch.Tensor] = {}
        reports = []
        for name, _ in linear_modules(block):
            full = prefix + name
            scheme = self.config.scheme_for(full)
            if scheme is None:
                continue
            if name not in statistics:
                raise SvskError(f"{full}: saw no calibration token, so it cannot be quantised. Add it to --ignore.")
            weight = self.source.tensors.read(f"{full}.weight").to(self.device)
            linear, report = quantize_linear(full, weight, statistics[name], self.recipe, scheme, self.scale_dtype)
            tensors |= linear.to_tensors()
            reports.append(report)
            self.progress.layer(report)
        quantised = {f"{report.name}.weight" for report in reports}
        for name in self.source.tensors.names:
            if name.startswith(prefix) and name not in quantised and self.source.is_stored(name):
                tensors[name] = self._dense(name)
        write_tensors(shard, tensors)
        return reports

    def _dense(self, name: str) -> torch.Tensor:
        """A tensor that is not quantised. Only the model's own dtype is changed, where another one was asked for."""
        tensor = self.source.tensors.read(name)
        if tensor.dtype != self.source.native_dtype or tensor.dtype == self.scale_dtype:
            return tensor
        cast = tensor.to(self.scale_dtype)
        if not bool(torch.isfinite(cast).all()) and bool(torch.isfinite(tensor).all()):
            raise SvskError(f"{name}: has values that {self.scale_dtype} cannot hold. Use --dtype bfloat16.")
        return cast

    def _write_rest(self, partial: Path) -> None:
        """Embedding, final norm, output head: everything outside the blocks."""
        inside = f"{self.blocks_name}."
        names = [n for n in self.source.tensors.names if not n.startswith(inside) and self.source.is_stored(n)]
        write_tensors(self._shard_path(partial, 0), {name: self._dense(name) for name in names})

    def _finish(self, partial: Path, layers: list[LayerReport]) -> None:
        """Index, configuration, tokenizer files and model card."""
        from safetensors import safe_open

        weight_map: dict[str, str] = {}
        total = 0
        for number in range(len(self.blocks) + 1):
            shard = self._shard_path(partial, number)
            with safe_open(shard, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    weight_map[name] = shard.name
                    tensor = handle.get_tensor(name)
                    total += tensor.numel() * tensor.element_size()
        write_json(partial / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        config = {key: value for key, value in self.source.config_dict.items() if key not in ("dtype", "torch_dtype")}
        config["dtype"] = str(self.scale_dtype).removeprefix("torch.")
        write_json(partial / "config.json", {**config, "quantization_config": self.config.to_dict()})
        for pattern in _COPIED:
            for path in self.source.folder.glob(pattern):
                if path.name not in _NOT_COPIED and not path.name.endswith(".index.json"):
                    shutil.copyfile(path, partial / path.name)
        write_text(partial / "README.md", model_card(self.source.folder.name, self.config, layers))
        for path in (*partial.glob("*.report.json"), partial / _STATE_NAME):
            path.unlink()
