# SPDX-License-Identifier: Apache-2.0
"""Tune a recipe to a model.

Quantise by many recipes, score each on text that none was calibrated on, keep the best.

One calibration text is drawn and split into pieces to calibrate with and pieces to score on. The
first trial is the recipe as it is; :mod:`svsk_eval.tune.search` says which ones follow, and when
one counts as better. A trial is scored by the mean KL divergence to the dense model over the
held-out pieces. Its checkpoint is deleted, its figures are kept in the work folder: a search that
is killed loses the trial under way and no other. What a trial's plan measures of model and text is
kept there too, and is measured again only for a trial that changes what it depends on.

The result is the best of many on the held-out pieces, so its KL there is a little too good; the
noise rule limits by how much. Score the final checkpoint on other text (``svsk eval``) for figures
to report.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from transformers import PreTrainedModel

from svsk_eval.errors import EvalError
from svsk_eval.text.models import load_model
from svsk_eval.text.scoring import compare_models
from svsk_eval.tune.held_out import split_calibration
from svsk_eval.tune.search import Search, Step
from svsk_eval.tune.trials import Score, State, Trial, differences
from svsk_kernels.errors import SvskError, one_line
from svsk_offline.calibration import CalibrationSet
from svsk_offline.calibration.sources import check_sources
from svsk_offline.calibration_entries import DEFAULT_SOURCE, calibration_entries
from svsk_offline.pipeline import Progress, load_texts, quantize, resolve_device
from svsk_offline.preflight import check_recipe, check_recipe_file, refuse_file
from svsk_offline.recipe import Recipe, load_recipe
from svsk_offline.storage.atomic import PartialFolder, write_text
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.hub import resolve_model
from svsk_offline.storage.locks import LOCK_NAME, locked
from svsk_vllm.format.shards import read_json
from svsk_vllm.version import __version__

__all__ = ["TuneProgress", "TuneResult", "tune"]

_STATE_NAME: Final = "svsk-tune.json"
_TRIAL_NAME: Final = "svsk-tune-trial"
_MEASURED_NAME: Final = "measured"


@dataclass
class TuneProgress:
    """Callbacks of a search; the default ones do nothing."""

    message: Callable[[str], None] = lambda text: None
    start: Callable[[int, Recipe], None] = lambda number, recipe: None
    block: Callable[[int, int], None] = lambda index, total: None
    step: Callable[[Step], None] = lambda step: None


@dataclass(frozen=True)
class TuneResult:
    """What a search found.

    Attributes:
        out: the recipe file.
        recipe: its recipe.
        chosen: the trial of that recipe.
        default: the trial of the recipe the search started from.
        trials: all trials, in the order they were run.
        refused: how many values were left out because the recipe's rules refuse them.
        converged: a whole sweep brought nothing; else the budget was spent.
        seconds: spent by all runs together.
    """

    out: Path
    recipe: Recipe
    chosen: Trial
    default: Trial
    trials: list[Trial]
    refused: int
    converged: bool
    seconds: float


def tune(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | str = "best",
    *,
    budget_minutes: float = 60.0,
    calibration: str | Sequence[str] = DEFAULT_SOURCE,
    chat_template: bool = False,
    held_out: int = 16,
    work_dir: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: TuneProgress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> TuneResult:
    """Search for a recipe that suits a model better, and write it to a file.

    The dense model stays in memory while trials are quantised, and the restored model of a trial
    joins it to be scored: twice the dense model in float32 on a CPU, in bfloat16 elsewhere.

    Args:
        model: folder or hub name of the dense model.
        out: recipe file to write, ``.yaml``.
        recipe: a recipe, or the name or file of one. With ``allocation.target_bpw`` only trials of
            at most so many bits per weight count; without, every trial does. Its samples, sequence
            length and seed say how calibration text is drawn.
        budget_minutes: for all runs of this search together. A trial is not started if, going by
            the median of the ones before, it would end later; the first one always is.
        calibration: text sources, see :func:`svsk_offline.calibration.load_calibration`.
        chat_template: render question and answer rows as chat messages.
        held_out: pieces to score on, drawn beyond the recipe's samples, 2 or more.
        work_dir: folder for the checkpoint of the trial under way, for what is known and for what
            was measured; None is ``OUT.tune``.
        device: ``auto``, ``cpu``, ``cuda`` ...
        dtype: of scales and unquantised tensors, ``auto`` for the model's own.
        overwrite: replace ``out``, and forget a search with other inputs in ``work_dir``.
        trust_remote_code: run Python files that come with the model.
        progress: callbacks.
        clock: seconds from any origin.

    Returns:
        The trials and the one that was chosen.

    Raises:
        SvskError, SvskFormatError: as :func:`svsk_offline.pipeline.quantize`, for the first trial.
        EvalError: an argument is out of range, ``out`` exists, ``work_dir`` holds another search or
            a damaged one, or no trial is within the target.
    """
    progress = progress or TuneProgress()
    out = Path(out)
    work = out.with_name(f"{out.name}.tune") if work_dir is None else Path(work_dir)
    _check_arguments(out, work, budget_minutes, held_out, overwrite)
    texts = [calibration] if isinstance(calibration, str) else list(calibration)
    check_sources(calibration_entries(texts), chat_template)
    resolve_device(device)
    start = load_recipe(recipe) if isinstance(recipe, str) else recipe
    folder = resolve_model(str(model), trust_remote_code=trust_remote_code)
    source = ModelSource(folder, trust_remote_code=trust_remote_code)
    source.check()
    # Refuses a folder that overlaps the model's.
    PartialFolder(work / _TRIAL_NAME, source.folder, overwrite=True)
    check_recipe(start, source.linear_names(), progress.message)
    work.mkdir(parents=True, exist_ok=True)
    with locked(work / LOCK_NAME, work):
        inputs = _load_inputs(
            source, start, texts, chat_template, held_out, device, dtype, progress
        )
        state = _open_state(work / _STATE_NAME, inputs.identity(start), overwrite, progress)
        trials = _Trials(inputs, work / _TRIAL_NAME, progress, clock)
        search = Search(
            start, trials.run, state, budget_minutes * 60, clock, progress.start, progress.step
        )
        return _search(search, out, model, texts, inputs.held)


@dataclass(frozen=True)
class _Inputs:
    """What all trials share; ``dtype`` is that of scales and dense tensors."""

    source: ModelSource
    training: CalibrationSet
    held: CalibrationSet
    device: torch.device
    dtype: str

    def identity(self, recipe: Recipe) -> dict[str, Any]:
        """What a trial depends on besides its recipe, and the recipe the search starts from.

        JSON values.
        """
        return {
            "svsk": __version__,
            **self.source.identity(),
            "calibration": [self.training.fingerprint, self.held.fingerprint],
            "device": self.device.type,
            "dtype": self.dtype,
            "recipe": recipe.digest,
        }


def _load_inputs(
    source: ModelSource,
    recipe: Recipe,
    calibration: Sequence[str],
    chat_template: bool,
    held_out: int,
    device: str,
    dtype: str,
    progress: TuneProgress,
) -> _Inputs:
    """Resolve device and dtype, draw the calibration text and split it."""
    where = resolve_device(device)
    stored = str(source.model_dtype(dtype)).removeprefix("torch.")
    progress.message(f"{held_out} more samples are held out")
    drawn = load_texts(source, calibration, recipe, chat_template, progress.message, more=held_out)
    return _Inputs(source, *split_calibration(drawn, held_out), where, stored)


class _Trials:
    """Runs trials of one model on one calibration text."""

    def __init__(
        self, inputs: _Inputs, folder: Path, progress: TuneProgress, clock: Callable[[], float]
    ) -> None:
        self.inputs, self.folder, self.progress, self.clock = inputs, folder, progress, clock
        self._clear()  # of a run that was killed

    def run(self, recipe: Recipe) -> Score:
        """Quantise by a recipe and score what comes out.

        Raises:
            SvskError, SvskFormatError: it cannot be quantised by this recipe.
            EvalError: its logits are not finite, or memory or a factorisation failed.
        """
        inputs, reference = self.inputs, self._reference  # loaded before the clock is read
        started = self.clock()
        try:
            result = quantize(
                inputs.source.folder,
                self.folder,
                recipe,
                calibration=inputs.training,
                device=str(inputs.device),
                dtype=inputs.dtype,
                overwrite=True,
                trust_remote_code=inputs.source.trust_remote_code,
                measurements=self.folder.with_name(_MEASURED_NAME),
                progress=Progress(block=self.progress.block),
            )
            loaded = self._load(self.folder)
            scores = compare_models(loaded, reference, inputs.held.tokens)
        except (torch.OutOfMemoryError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise EvalError(f"{type(error).__name__}: {one_line(error)}") from error
        finally:
            self._clear()
        kl = scores.per_chunk.kl
        assert kl is not None, "there is a reference"
        assert scores.delta_nll is not None, "there is a reference"
        assert scores.top1 is not None, "there is a reference"
        return Score(
            result.bits_per_weight, kl, scores.delta_nll, scores.top1, self.clock() - started
        )

    @cached_property
    def _reference(self) -> PreTrainedModel:
        self.progress.message("Loading the dense model to compare with")
        return self._load(self.inputs.source.folder)

    def _load(self, folder: Path) -> PreTrainedModel:
        trust = self.inputs.source.trust_remote_code
        return load_model(folder, None, self.inputs.device, trust_remote_code=trust)

    def _clear(self) -> None:
        for folder in (
            self.folder,
            PartialFolder(self.folder, self.inputs.source.folder, overwrite=True).path,
        ):
            shutil.rmtree(folder, ignore_errors=True)


def _check_arguments(
    out: Path, work: Path, budget_minutes: float, held_out: int, overwrite: bool
) -> None:
    check_recipe_file(out, overwrite=overwrite)
    if out.exists() and not _is_recipe(out):
        raise EvalError(
            f"{out}: holds something that is not a recipe, so --overwrite does not replace it."
        )
    refuse_file(work, f"--work-dir {work}")
    if held_out < 2:
        raise EvalError(
            f"--held-out is {held_out}, expected 2 or more: one piece has no standard error."
        )
    if not budget_minutes > 0:
        raise EvalError(f"--budget-minutes is {budget_minutes}, expected more than 0.")


def _is_recipe(path: Path) -> bool:
    try:
        load_recipe(str(path))
    except (SvskError, OSError, ValueError):
        return False
    return True


def _open_state(
    path: Path, identity: dict[str, Any], overwrite: bool, progress: TuneProgress
) -> State:
    """The state of an earlier run, or a new one.

    Raises:
        EvalError: the file is of another search, or damaged, and may not be overwritten.
        SvskFormatError: it is not JSON, and may not be overwritten.
    """
    state = State(path, identity)
    if not path.exists():
        return state
    try:
        raw = read_json(path)
        before = raw.get("identity")
        before = before if isinstance(before, dict) else {}
        other = [key for key in identity if before.get(key) != identity[key]]
        if other:
            raise EvalError(
                f"{path}: is of another search, with another {', '.join(other)}. Delete it, choose"
                " another --work-dir, or pass --overwrite to start again."
            )
        state.restore(raw)
    except ValueError:
        if not overwrite:
            raise
        return State(path, identity)
    progress.message(
        f"Known from earlier runs: {len(state.trials)} trial(s), {state.seconds / 60:.1f} min"
    )
    return state


def _search(
    search: Search, out: Path, model: str | Path, calibration: Sequence[str], held: CalibrationSet
) -> TuneResult:
    """Run a search and write its result."""
    converged = search.execute()
    assert search.best is not None, "a search without a result raises"
    trials = search.state.trials
    best, default = search.best, trials[search.default.digest]
    recipe = _write_recipe(out, best, default, model, calibration, held)
    return TuneResult(
        out,
        recipe,
        best,
        default,
        list(trials.values()),
        search.refused,
        converged,
        search.state.seconds,
    )


def _write_recipe(
    out: Path,
    best: Trial,
    default: Trial,
    model: str | Path,
    calibration: Sequence[str],
    held: CalibrationSet,
) -> Recipe:
    """Write a trial's recipe, named after the file; read back, it has the same digest."""
    figures = []
    for trial in (best, default):
        assert trial.score is not None, "it would have ended the search"
        figures.append(f"{trial.score.kl:.5f} ± {trial.score.kl_se:.5f}")
    pieces, seq_len = held.tokens.shape
    description = (
        f"Tuned to {model}: held-out KL {figures[0]}, {figures[1]} with {default.recipe.name} "
        f"({pieces} x {seq_len} tokens of {', '.join(calibration)})."
    )
    changed = ", ".join(
        f"{key} {value}" for key, value in differences(best.recipe, default.recipe).items()
    )
    lines = (
        f"Made by svsk {__version__} tune. {description}",
        f"Changed: {changed or 'nothing, no trial was better'}.",
        " ".join(
            (
                f"Use: svsk quantize {model} OUT --recipe {out.name}",
                *(f"--calibration {entry}" for entry in calibration),
            )
        ),
    )
    recipe = best.recipe.model_copy(update={"name": out.stem, "description": description})
    values = yaml.safe_dump(recipe.written(), sort_keys=False, allow_unicode=True, width=120)
    write_text(out, "".join(f"# {' '.join(line.split())}\n" for line in lines) + values)
    return recipe
