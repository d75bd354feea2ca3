# SPDX-License-Identifier: Apache-2.0
"""One quantisation under way: it claims its folder, decides, and writes block after block."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from svsk_kernels.errors import SvskError
from svsk_offline.calibration import BlockRunner, CalibrationSet
from svsk_offline.calibration.held_out import held_out_last
from svsk_offline.calibration.room import keep_few_products, peak_memory_gib
from svsk_offline.planning.division import check_divisible
from svsk_offline.planning.folded_model import folded_model
from svsk_offline.planning.measurements import Measuring
from svsk_offline.planning.needs import Needs
from svsk_offline.planning.plan import Plan, make_plan, uniform_schemes
from svsk_offline.planning.serving import bases_alone, check_servable, dense_matrices
from svsk_offline.planning.tables import after_head, plan_tables
from svsk_offline.precision import block_dtype, full_float32
from svsk_offline.quantization_result import Progress, QuantizationResult
from svsk_offline.quantize_block import BlockQuantizer
from svsk_offline.quantize_tables import quantize_tables
from svsk_offline.recipe import USUAL_IGNORE, AlternatingRecipe, Recipe
from svsk_offline.storage.atomic import PartialFolder, write_json
from svsk_offline.storage.checkpoint_writer import CheckpointWriter, QuantizedTables
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.layer_report import LayerReport, thin_experts
from svsk_offline.storage.loaded_weight import put_weights
from svsk_offline.unfinished import STATE_NAME, refuse_other_run
from svsk_offline.world import ALONE, World
from svsk_vllm.format import ConfigGroup, SvskCheckpointConfig
from svsk_vllm.format.fingerprint import FINGERPRINT_KEY
from svsk_vllm.format.shards import read_json
from svsk_vllm.format.targets import matches
from svsk_vllm.version import __version__

__all__ = ["Run"]

_PLAN_NAME: Final = "svsk-plan.safetensors"


class Run:
    """State of one quantisation.

    Args:
        source: the dense model.
        folder: what is written.
        recipe: how.
        texts: gives the calibration text, once everything that takes no time is checked.
        device: where to compute.
        scale_dtype: stored dtype of scales.
        progress: callbacks.
        kept: folder that keeps what the plan measures for other runs; None keeps nothing.
        world: the processes that quantise together; only the leading one speaks and writes.
        memory_budget: bytes that each may hold; None for no limit.
    """

    def __init__(
        self,
        source: ModelSource,
        folder: PartialFolder,
        recipe: Recipe,
        texts: Callable[[], CalibrationSet],
        device: torch.device,
        scale_dtype: torch.dtype,
        progress: Progress,
        kept: Path | None = None,
        world: World = ALONE,
        memory_budget: int | None = None,
    ) -> None:
        self.world, self.memory_budget = world, memory_budget
        self.source, self.folder, self.kept = source, folder, kept
        self.device, self.scale_dtype, self.progress = device, scale_dtype, progress
        self.blocks_name, self.blocks = source.blocks
        self.asked = recipe.values()
        self.recipe = self._for_bases_alone(recipe)
        self.alternating = self.recipe if isinstance(self.recipe, AlternatingRecipe) else None
        self.allocation = self.alternating.allocation if self.alternating else None
        self.tables = plan_tables(source, self.recipe, scale_dtype, progress.message)
        self.config = self._uniform_config({})  # without text, for the checks that come before it
        self._check_targets()
        self.planned = after_head(source, self.recipe, self.tables, self.schemes, progress.message)
        check_divisible(world, self.recipe, self.schemes, source.folder)
        self.needs(0).within(memory_budget)  # what no number of samples changes
        if memory_budget is not None:
            keep_few_products()
        self._draw = texts

    def needs(self, samples: int) -> Needs:
        """What the run would hold, with so many calibration samples.

        The libraries count as far as they share memory with what is computed.
        """
        return Needs.of(
            self.source,
            self.recipe,
            self.schemes,
            samples,
            itemsize=block_dtype(self.device).itemsize,
            program=int(peak_memory_gib() * (1 << 30)) if self.device.type == "cpu" else 0,
        )

    def execute(self, overwrite: bool) -> QuantizationResult:
        """Decide, write all shards, then the rest of the folder."""
        drawn = self.world.first(self._draw)  # only now: it takes time
        self.texts, self.held_out = held_out_last(drawn)
        self.room = self.needs(len(self.texts.tokens)).within(self.memory_budget)
        if self.alternating and self.alternating.alternating.aim and not self.held_out:
            raise SvskError(
                "alternating.aim: how much of its correction a matrix takes is decided on samples"
                f" that are held out, but there is {len(self.texts.tokens)} calibration sample,"
                " which is fitted. Raise --samples, give more text, or take --aim 0."
            )
        self._check_shares()
        self.config = self._uniform_config({**drawn.describe(), "held_out": self.held_out})
        producer = {**self.config.producer, FINGERPRINT_KEY: self._fingerprint()}
        self.config = self.config.model_copy(update={"producer": producer})
        with full_float32(self.progress.message):
            return self._execute(overwrite)

    def _execute(self, overwrite: bool) -> QuantizationResult:
        result = self.world.first(lambda: self._claim(overwrite))
        self.world.check_seen(result)
        started = time.perf_counter()
        self._smooth()
        plan = self._plan()
        planned = time.perf_counter() - started
        writer = CheckpointWriter(
            result,
            self.folder.path,
            self.source,
            self.scale_dtype,
            self.config.producer[FINGERPRINT_KEY],
        )
        layers, tables, seconds = self._write_blocks(writer, plan)
        if self.allocation is not None:
            groups = plan.groups() | self.tables.groups
            self.config = self.config.model_copy(update={"config_groups": groups})
        out = self.world.first(lambda: self._finish(writer, layers, tables))
        return QuantizationResult(out, layers, list(tables.reports), seconds, planned)

    def _finish(
        self, writer: CheckpointWriter, layers: list[LayerReport], tables: QuantizedTables
    ) -> Path:
        """Write what is left, and put the checkpoint in its place; its folder."""
        writer.finish(self.config, layers, tables, self.progress.message)
        if thin := thin_experts(layers):
            self.progress.message(
                "Experts with fewer routed calibration tokens than inputs, by number, tokens in"
                " brackets; the rest of their Hessians comes from the layer's other experts:\n  "
                + "\n  ".join(thin)
            )
        return self.folder.commit()

    def _for_bases_alone(self, recipe: Recipe) -> Recipe:
        """A recipe whose budget is for bases alone, where vLLM serves a model without sidecars."""
        if recipe.target_bpw is None or not recipe.largest_rank:
            return recipe
        linears = (n for n in self.source.block_linears() if not matches(n, recipe.ignore))
        if reason := bases_alone(self.source, linears):
            self.progress.message(f"Bases alone share the bit budget: {reason}")
            return recipe.override({"sidecar": {"rank": 0}, "allocation": {"ranks": (0,)}})
        return recipe

    def _fingerprint(self) -> str:
        """What tells this run's shards from others'; the same for the same inputs."""
        inputs = [
            self.config.to_dict(),
            self.source.content_sample,
            self.device.type,
            str(self.scale_dtype),
        ]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def _uniform_config(self, calibration: Mapping[str, Any]) -> SvskCheckpointConfig:
        """The checkpoint's config, every linear with the recipe's scheme."""
        recipe = self.recipe
        group = ConfigGroup(targets=("Linear",), weights=recipe.weights, sidecar=recipe.sidecar)
        producer: dict[str, Any] = {
            "svsk": __version__,
            "recipe": recipe.name,
            "recipe_hash": recipe.digest,
            "recipe_values": recipe.values(),
            "calibration": dict(calibration),
        }
        if self.world.size > 1:  # they add up in another order
            producer["processes"] = self.world.size
        # Linears outside the decoder blocks (an output head, say) stay as they are, so the config
        # must say so; what recipes say for all models it says where this one has it.
        linears = self.source.linear_names()
        ignored = [
            entry
            for entry in recipe.ignore
            if entry not in USUAL_IGNORE or any(matches(name, (entry,)) for name in linears)
        ]
        ignore = dict.fromkeys((*ignored, *self.source.other_linears()))
        return SvskCheckpointConfig(
            config_groups={"group_0": group} | self.tables.groups,
            ignore=tuple(self.tables.left(ignore)),
            embedding=self.tables.embedding,
            activations=recipe.activations,
            producer=producer,
        )

    def _check_targets(self) -> None:
        """Refuse before any work what would fail in the middle."""
        if all(self.config.scheme_for(name) is None for name in self.source.block_linears()):
            raise SvskError(
                f"{self.source.folder}: every linear layer is"
                " on the ignore list; nothing to quantise."
            )
        self.schemes = uniform_schemes(self.source, self.config, self.scale_dtype)
        if dense := dense_matrices(self.source, self.schemes):
            kinds = ", ".join(f"{name} ({count})" for name, count in dense.items())
            self.progress.message(f"Stay dense in the blocks: {kinds}")
        budget = self.allocation
        most = 0 if budget is None else budget.largest_rank
        check_servable(self.source, self.schemes, self.progress.message, most=most)
        sizes = () if budget is None else budget.group_sizes
        for name in self.schemes if sizes else ():
            k = self.source.tensors.describe(f"{name}.weight").shape[1]
            if all(k % size for size in sizes):
                raise SvskError(
                    f"{name}: K = {k} input features is a multiple of none of"
                    f" allocation.group_sizes {sizes}. Add a smaller one, or add the module to"
                    " --ignore."
                )

    def _check_shares(self) -> None:
        """Refuse samples that are too few for the processes, before the folder is claimed."""
        self.world.samples(len(self.texts.tokens), self.held_out)
        planned = self.planned
        if isinstance(planned, AlternatingRecipe) and planned.needs_gradients:
            fitted, dtype = self._fitted_texts(), self.scale_dtype
            args = self.source, self.schemes, planned, fitted, self.device, dtype
            Measuring.of(*args, world=self.world).share()

    def _claim(self, overwrite: bool) -> Path:
        """Note what this run is, or check that the one found is the same; the result's folder."""
        identity = {
            **self.source.identity(),
            "device": self.device.type,
            "config": self.config.to_dict(),
            "dtype": str(self.scale_dtype),
        }
        identity = json.loads(json.dumps(identity))
        partial = self.folder.path
        state = partial / STATE_NAME
        # A run that is killed while it writes its state leaves a temporary file and nothing else.
        unknown = (
            not state.exists()
            and partial.exists()
            and any(p.suffix != ".tmp" for p in partial.iterdir())
        )
        if unknown:
            raise SvskError(
                f"{partial}: holds something that is not an"
                " unfinished run. It is not deleted: move it away."
            )
        if state.exists():
            found = read_json(state)
            found.pop("asked", None)  # said otherwise, it may still be the same
            if found != identity:
                if not overwrite:
                    refuse_other_run(partial, found, identity)
                self.folder.discard()
        partial.mkdir(parents=True, exist_ok=True)
        # First: nothing is in the folder without it.
        write_json(state, identity | {"asked": self.asked})
        return self.folder.create()

    def _smooth(self) -> None:
        """From here on the model is the folded one, where the recipe smooths; say so."""
        args = self.recipe.smoothing
        if args is None:
            return
        self.source, record = folded_model(
            self.source,
            self._fitted_texts(),
            args,
            self.device,
            self.folder.path,
            progress=self.progress.block,
            say=self.progress.message,
            world=self.world,
        )
        producer = {**self.config.producer, "smoothing": record}
        producer[FINGERPRINT_KEY] = self._fingerprint()  # of the folded model
        self.config = self.config.model_copy(update={"producer": producer})

    def _fitted_texts(self) -> CalibrationSet:
        return self.texts.first(len(self.texts.tokens) - self.held_out)

    def _plan(self) -> Plan:
        """What to do with each linear: as an earlier run decided, or measured now."""
        path = self.folder.path / _PLAN_NAME
        if self.world.first(path.exists):
            return Plan.load(path)
        plan = make_plan(
            self.source,
            self.schemes,
            self.planned,
            self._fitted_texts(),
            self.device,
            self.scale_dtype,
            self.folder.path,
            self.kept,
            progress=self.progress.block,
            say=self.progress.message,
            world=self.world,
            room=self.room,
        )
        self.world.first(lambda: plan.save(path))
        return plan if self.world.leads else Plan.load(path)

    def _runner(self) -> BlockRunner:
        """Of this process's samples."""
        places, held_out = self.world.samples(len(self.texts.tokens), self.held_out)
        return BlockRunner(
            self.source,
            self.texts.picked(places),
            self.device,
            block_dtype(self.device),
            memory_limit=self.room.hidden,
            scratch=self.folder.path,
            held_out=held_out,
            apart=self.held_out > 0,
        )

    def _write_blocks(
        self, writer: CheckpointWriter, plan: Plan
    ) -> tuple[list[LayerReport], QuantizedTables, list[float]]:
        scratch, world, runner = self.folder.path, self.world, self._runner()
        sequential = self.recipe.sequential
        quantizer = BlockQuantizer(
            self.source, self.recipe, plan, runner, self.scale_dtype, scratch, self.room, world
        )
        layers: list[LayerReport] = []
        seconds: list[float] = []
        try:
            for index, block in enumerate(self.blocks):
                started = time.perf_counter()
                self.source.load(block, f"{self.blocks_name}.{index}.", runner.dtype, self.device)
                reports = world.first(partial(writer.finished, index))
                skipped = reports is not None
                if reports is None:
                    linears, reports = quantizer.quantize(index, block)
                    for report in reports:
                        self.progress.layer(report)
                    if world.leads:
                        writer.write_block(index, linears, reports)
                elif sequential:
                    # As the first run did.
                    linears = world.first(partial(writer.read_block, index, plan.schemes))
                    quantizer.skip(index, block)
                else:
                    self.progress.message(f"Block {index}: finished by an earlier run")
                    runner.advance(index, block)
                if sequential:
                    names = {full: name for name, full, _ in self.source.linears(index)}
                    put_weights(block, names, linears)
                    runner.advance(index, block)
                self.source.unload(block)
                layers += reports
                seconds.append(time.perf_counter() - started)
                if skipped:
                    self.progress.skipped(index + 1, len(self.blocks))
                self.progress.block(index + 1, len(self.blocks))
            tables = quantize_tables(
                self.tables,
                runner,
                self.texts.tokens,
                self.held_out,
                self.recipe,
                self.progress.message,
                world,
            )
        finally:
            quantizer.close()
            runner.close()
        for report in tables.reports:
            self.progress.layer(report)
        return layers, tables, seconds
