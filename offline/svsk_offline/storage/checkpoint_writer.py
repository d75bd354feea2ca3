# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint being written: a part per decoder block, then everything else.

Parts lie in the working folder, so that a run that is stopped goes on after the last one. At the
end they are put together into files of at most 5 GB. Which parts a file takes is written down
before the first is put together: a part is removed as soon as its file is there, and a run that is
stopped meanwhile finds it there.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from svsk_kernels.errors import SvskError
from svsk_offline.storage.atomic import write_index, write_json, write_tensors, write_text
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.inspection import whole_bits_per_weight
from svsk_offline.storage.layer_report import REPORT_NAME, LayerReport, report_json
from svsk_offline.storage.model_card import Origin, model_card
from svsk_offline.storage.shard_files import group_files, merge_files, shard_names
from svsk_offline.storage.side_files import copy_side_files
from svsk_vllm.format import (
    ConfigGroup,
    LinearSpec,
    QuantizedLinear,
    SvskCheckpointConfig,
    SvskFormatError,
)
from svsk_vllm.format.fingerprint import FINGERPRINT_KEY, shard_fingerprint
from svsk_vllm.format.model_config import declared
from svsk_vllm.format.seal import schemes_metadata
from svsk_vllm.format.shards import ShardedReader, read_json
from svsk_vllm.format.suffixes import split_suffix

__all__ = ["SHARD_BYTES", "CheckpointWriter", "QuantizedTables"]

SHARD_BYTES: Final = 5_000_000_000
"""Of a file of the checkpoint, at most, but for a block or table that is larger by itself."""

_PLAN_NAME: Final = "svsk-shards.json"

_FLOAT32: Final = re.compile(r"(^|\.)(A_log|D|dt_bias|e_score_correction_bias|expert_bias)$")
"""Small vectors that vLLM's classes hold in float32 although transformers' do not say so."""


@dataclass(frozen=True)
class QuantizedTables:
    """Embedding and output head as they are stored.

    Attributes:
        linears: those that are quantised.
        reports: of each of them.
        replaced: the dense tensors in whose place they are stored.
        untied: whether the model's one table is stored as two.
    """

    linears: tuple[QuantizedLinear, ...] = ()
    reports: tuple[LayerReport, ...] = ()
    replaced: frozenset[str] = frozenset()
    untied: bool = False


class CheckpointWriter:
    """Writes a checkpoint's shards and the files around them.

    Args:
        folder: where to write, usually a partial folder.
        notes: folder for what only an interrupted run needs, parts and reports of finished blocks.
        source: the dense model.
        scale_dtype: dtype of unquantised tensors.
        fingerprint: of the run, for the metadata of every shard.
    """

    def __init__(
        self,
        folder: Path,
        notes: Path,
        source: ModelSource,
        scale_dtype: torch.dtype,
        fingerprint: str,
    ) -> None:
        self.folder, self.notes, self.source, self.scale_dtype = folder, notes, source, scale_dtype
        self.fingerprint = fingerprint
        self.blocks = source.blocks[1]
        self.parts = notes / "parts"
        self.parts.mkdir(exist_ok=True)

    def finished(self, index: int) -> list[LayerReport] | None:
        """Reports of block ``index`` if a run with these inputs has written its part."""
        holder = self._holder(index + 1)
        reports = self._reports_path(index)
        if not self._is_own(holder) or not reports.exists():
            return None
        return [LayerReport(**row) for row in read_json(reports)["layers"]]

    def write_block(
        self, index: int, linears: Sequence[QuantizedLinear], reports: Sequence[LayerReport]
    ) -> None:
        """Write the part of block ``index``: its quantised linears, its other tensors as is."""
        tensors: dict[str, torch.Tensor] = {}
        for linear in linears:
            tensors |= linear.to_tensors()
        replaced = {f"{linear.spec.name}.weight" for linear in linears}
        for name in self.source.block_tensors(index):
            if name not in replaced:
                tensors[self.source.map.output_name(name)] = self._dense(name)
        self._write(self._part(index + 1), tensors)
        write_json(self._reports_path(index), {"layers": [asdict(report) for report in reports]})

    def read_block(self, index: int, schemes: Mapping[str, ConfigGroup]) -> list[QuantizedLinear]:
        """The quantised linears of block ``index`` from its part, or the file that has it."""
        holder = self._holder(index + 1)
        reader = ShardedReader(holder.parent, shards=[holder.name])
        stored: dict[str, list[str]] = {}
        for name in reader.names:
            if split := split_suffix(name):
                stored.setdefault(split[0], []).append(name)
        linears = []
        for _, full, linear in self.source.linears(index):
            if full in schemes:
                spec = LinearSpec(
                    full, linear.out_features, linear.in_features, schemes[full], self.scale_dtype
                )
                tensors = {name: reader.read(name) for name in stored[full]}
                linears.append(QuantizedLinear.from_tensors(spec, tensors))
        return linears

    def finish(
        self,
        config: SvskCheckpointConfig,
        layers: list[LayerReport],
        tables: QuantizedTables,
        say: Callable[[str], None],
    ) -> None:
        """Write what is outside the blocks, the index, the config, the other files and the card.

        ``say`` is told of files that are left out.
        """
        schemes = {
            layer.name: scheme
            for layer in (*layers, *tables.reports)
            if (scheme := config.scheme_for(layer.name))
        }
        outside = {
            self.source.map.output_name(name): self._dense(name)
            for name in self.source.outside_tensors()
            if name not in tables.replaced
        }
        for table in tables.linears:
            outside |= table.to_tensors()
        self._write(self._part(0), outside, schemes_metadata(schemes))
        self._put_together()
        model = {
            key: value
            for key, value in self.source.output_config(untied=tables.untied).items()
            if key not in ("dtype", "torch_dtype")
        }
        model["dtype"] = str(self.scale_dtype).removeprefix("torch.")
        write_json(self.folder / "config.json", declared(model, config))
        copy_side_files(self.source.folder, self.folder, say, code=self.source.trust_remote_code)
        card = model_card(
            Origin.of(self.source.folder),
            config,
            layers,
            tables.reports,
            whole=whole_bits_per_weight(self.folder),
            size=sum(path.stat().st_size for path in self.folder.glob("*.safetensors")),
        )
        write_text(self.folder / "README.md", card)
        write_json(self.folder / REPORT_NAME, report_json([*layers, *tables.reports]))

    def _write(
        self,
        shard: Path,
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        write_tensors(shard, tensors, {FINGERPRINT_KEY: self.fingerprint, **(metadata or {})})

    def _put_together(self) -> None:
        """Make the checkpoint's files of the parts, and remove these."""
        count = len(self.blocks) + 1
        plan = self.notes / _PLAN_NAME
        if not plan.exists():
            sizes = [self._part(number).stat().st_size for number in range(count)]
            groups = group_files(sizes, SHARD_BYTES)
            write_json(plan, dict(zip(shard_names(len(groups)), groups, strict=True)))
        files = read_json(plan)
        for other in self.folder.glob("*.safetensors"):
            if other.name not in files:
                other.unlink()  # of a version that wrote blocks there
        for name, numbers in files.items():
            parts = [self._part(number) for number in numbers]
            # One of other factors of smoothing may lie there; its blocks were then written anew.
            if not self._is_own(self.folder / name):
                merge_files(parts, self.folder / name)
            for part in parts:
                part.unlink(missing_ok=True)
        if len(files) > 1:
            write_index(self.folder, files)

    def _is_own(self, shard: Path) -> bool:
        """Whether a file is there, whole, and of a run with these inputs."""
        try:
            return shard.exists() and shard_fingerprint(shard) == self.fingerprint
        except SvskFormatError:
            return False

    def _part(self, number: int) -> Path:
        """Part of block ``number - 1``; number 0 is everything outside the blocks."""
        return self.parts / f"{number:05d}.safetensors"

    def _holder(self, number: int) -> Path:
        """The file that has a part: itself, or what it was put into before the run was stopped."""
        part, plan = self._part(number), self.notes / _PLAN_NAME
        if part.exists() or not plan.exists():
            return part
        (name,) = (name for name, numbers in read_json(plan).items() if number in numbers)
        return self.folder / name

    def _reports_path(self, index: int) -> Path:
        return self.notes / f"block-{index:05d}.report.json"

    @cached_property
    def _float32_names(self) -> frozenset[str]:
        """Tensors that the model's class keeps in float32 in a model of another dtype."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        skeleton: Any = self.source.model
        with init_empty_weights(include_buffers=True):
            model: Any = AutoModelForCausalLM.from_config(skeleton.config, dtype=self.scale_dtype)
        kept = {name for name, value in model.state_dict().items() if value.dtype == torch.float32}
        patterns = {
            *(model._keep_in_fp32_modules or ()),
            *(model._keep_in_fp32_modules_strict or ()),
        }
        names = [
            name
            for name in model.state_dict()
            if any(re.search(rf"\b{p}\b", name) for p in patterns)
        ]
        return frozenset({*kept, *names, *filter(_FLOAT32.search, model.state_dict())})

    def _dense(self, name: str) -> torch.Tensor:
        """A tensor that is not quantised.

        In the dtype that config.json declares, or float32 where the class insists.

        Both loaders would cast it anyway; wider it only takes room. What the class wants in float32
        stays as stored.
        """
        tensor = self.source.tensors.read(name)
        if not tensor.is_floating_point() or tensor.dtype == self.scale_dtype:
            return tensor
        # The class knows it by the name of the parameter it fills, which need not be that in the
        # folder.
        if not self._float32_names.isdisjoint((name, *self.source.map.targets(name))):
            return tensor
        cast = tensor.to(self.scale_dtype)
        if not bool(torch.isfinite(cast).all()) and bool(torch.isfinite(tensor).all()):
            raise SvskError(
                f"{name}: has values that {self.scale_dtype} cannot hold. Use --dtype bfloat16."
            )
        return cast
