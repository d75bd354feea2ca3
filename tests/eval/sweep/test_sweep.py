# SPDX-License-Identifier: Apache-2.0
"""``svsk sweep`` on a tiny model: what it gives, what it repeats after a kill, what it refuses."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import svsk_eval.sweep.steps as steps_module
import svsk_offline.planning.measurements as measurements_module
from svsk_eval.cli import app
from svsk_eval.errors import EvalError
from svsk_eval.sweep.request import own_variants, peer_variants
from svsk_eval.sweep.schema import SweepReport, load_sweep
from svsk_eval.sweep.settings import claim_folder
from svsk_eval.text.scoring import evaluate
from svsk_offline.pipeline import quantize
from svsk_offline.recipe import Recipe, load_recipe
from svsk_offline.storage.inspection import inspect_checkpoint
from tests.eval.bench.test_command import TASKS
from tests.support.format_builders import edit_json
from tests.support.tiny_models import write_dense


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_dense(folder / "dense")
    lines = (f"the rate of {n} stones in a tin is not {n * n % 97}. " for n in range(300))
    (folder / "text.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Labels of the folders given to ``quantize``."""
    calls: list[str] = []

    def counted(model: Path, out: Path, recipe: Recipe, **options: Any) -> Any:
        calls.append(out.name)
        return quantize(model, out, recipe, **options)

    monkeypatch.setattr(steps_module, "quantize", counted)
    return calls


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[list[str]]:
    """Arguments of ``peers.run``, which gives back the dense model; ``awq`` fails."""
    calls: list[list[str]] = []

    def pretend(peer: Any, arguments: list[str], _log: Path) -> None:
        calls.append(arguments)
        if "--check" in arguments:
            return
        if peer.peer == "awq":
            raise EvalError(f"{peer.label}: out of memory.")
        out = Path(arguments[2])
        shutil.copytree(folder / "dense", out)
        record: dict[str, Any] = {key: {} for key in ("settings", "versions", "types_by_linear")}
        record |= {"title": "a peer", "group_size": peer.group_size, "calibration": None}
        record |= {"bits_per_weight": 4.25, "bits_per_weight_of_all": 8.5, "bytes": 1024}
        record |= {"seconds": 2.0, "tables": {}, "notes": []}
        (out / "peer.json").write_text(json.dumps(record))

    monkeypatch.setattr(steps_module, "_run_peers", pretend)
    return calls


def sweep(folder: Path, out: Path, *more: object) -> Result:
    arguments = ["sweep", folder / "dense", out, "--text", folder / "text.txt", "--recipe", "fast"]
    arguments += ["--seq-len", 32, "--chunks", 3, "--samples", 24, *more]
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def report_of(out: Path) -> SweepReport:
    return load_sweep(out / "sweep.json")


@pytest.mark.usefixtures("forked")
class TestRun:
    def test_budgets_share_one_measuring_and_steps_are_kept(
        self,
        folder: Path,
        tmp_path: Path,
        quantized: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        measured = []
        run = measurements_module.Measuring.run

        def counted(*arguments: Any) -> Any:
            measured.append(1)
            return run(*arguments)

        monkeypatch.setattr(measurements_module.Measuring, "run", counted)
        score = steps_module.run_request

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(steps_module, "run_request", killed)
        out = tmp_path / "out"
        assert sweep(folder, out, "--bpw", "4.6").exit_code == 130
        assert quantized == ["svsk-4.6"]
        assert not (out / "sweep.json").exists()
        # the quantised model is there, and is not made again; another budget is added
        monkeypatch.setattr(steps_module, "run_request", score)
        result = sweep(folder, out, "--bpw", "4.6,5")
        assert result.exit_code == 0, result.output
        assert quantized == ["svsk-4.6", "svsk-5"]
        assert len(measured) == 1
        # a log says how far a step is, not only that it began
        assert re.search(r"^svsk-5: quantising (\d+)/\1, ", result.output, re.MULTILINE)
        assert "svsk-5: scoring the text 3/3, " in result.output
        found = report_of(out)
        assert [row.label for row in found.rows] == ["reference", "svsk-4.6", "svsk-5"]
        self.is_what_the_checkpoints_give(folder, out, found)
        # a third run has nothing to do, even where the models are gone
        shutil.rmtree(out / "models")
        monkeypatch.setattr(steps_module, "run_request", killed)
        assert sweep(folder, out, "--bpw", "4.6,5").exit_code == 0
        assert quantized == ["svsk-4.6", "svsk-5"]
        assert report_of(out).rows == found.rows
        for name in ("sweep.md", "sweep.svg"):
            assert "SVSK" in (out / name).read_text()
        # another setting is refused, with what it was
        changed = sweep(folder, out, "--bpw", "4.6", "--chunks", 2)
        assert changed.exit_code == 1
        assert "other settings: chunks was 3 and is 2" in changed.output

    def is_what_the_checkpoints_give(self, folder: Path, out: Path, found: SweepReport) -> None:
        for row in found.rows[1:]:
            made = inspect_checkpoint(out / "models" / row.label)
            assert row.size is not None
            assert row.size.bits_per_weight == made["bits_per_weight"]
            assert row.size.bits_per_weight_of_all == made["bits_per_weight_of_all"]
        row = found.rows[2]
        scores = evaluate(
            out / "models" / row.label, folder / "dense", folder / "text.txt", chunks=3, seq_len=32
        )
        assert row.text is not None
        assert row.text.kl_mean == pytest.approx(scores.kl_mean, rel=1e-4)
        assert row.text.per_chunk["kl"] == pytest.approx(scores.per_chunk.kl, rel=1e-4)
        assert found.rows[0].size is not None
        assert found.rows[0].size.bits_per_weight_of_all == 16

    def test_a_peer_that_fails_does_not_stop_the_others(
        self, folder: Path, tmp_path: Path, peers: list[list[str]]
    ) -> None:
        out = tmp_path / "out"
        result = sweep(folder, out, "--peer", "awq,gptq:64", "--tables", "reference")
        assert result.exit_code == 1
        assert "could not be done: awq: awq: out of memory." in result.output
        reference, failed, made = report_of(out).rows
        assert reference.kind == "reference"
        assert failed.error == "awq: out of memory."
        assert (failed.size, failed.text) == (None, None)
        assert (made.label, made.title) == ("gptq-g64", "a peer, groups of 64")
        assert made.text is not None
        assert made.text.kl_mean == pytest.approx(0, abs=1e-6)  # it gave the dense model back
        # all are checked before the first is run, on the samples that SVSK is calibrated on
        assert ["--check" in call for call in peers] == [True, True, False, False]
        for call in peers[2:]:
            asked = dict(zip(call[3::2], call[4::2], strict=False))
            assert asked["--seq-len"] == "32"
            assert asked["--tables"] == "reference"
            assert call[call.index("--samples") + 1] == "24"
        # the failed one is tried again, the other is not
        peers.clear()
        assert sweep(folder, out, "--peer", "awq,gptq:64", "--tables", "reference").exit_code == 1
        assert [call[0] for call in peers] == ["awq", "awq"]

    def test_a_peer_of_other_tokens_and_a_damaged_size(
        self,
        folder: Path,
        tmp_path: Path,
        peers: list[list[str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        out, pretend = tmp_path / "out", steps_module._run_peers

        def with_text(peer: Any, arguments: list[str], log: Path) -> None:
            pretend(peer, arguments, log)
            if "--check" not in arguments and peer.group_size is None:
                calibration = {"calibration": {"fingerprint": "of other tokens"}}
                edit_json(Path(arguments[2]) / "peer.json", lambda kept: kept.update(calibration))

        monkeypatch.setattr(steps_module, "_run_peers", with_text)
        asked = ("--peer", "gptq,gptq:64", "--tables", "reference")
        result = sweep(folder, out, *asked)
        assert result.exit_code == 1
        said = " ".join(result.output.split())
        assert "gptq: was calibrated on other tokens than the sweep's. Remove" in said
        (size,) = (path for path in out.rglob("size.json") if "gptq-g64" in path.parts)
        size.write_text("{}")
        again = " ".join(sweep(folder, out, *asked).output.split())
        assert re.search(r"size\.json: is damaged \(.*\)\. Remove it\.", again)

    def test_tasks_and_their_recovery(
        self, folder: Path, tmp_path: Path, peers: list[list[str]]
    ) -> None:
        out = tmp_path / "out"
        tasks = ["--tasks", "mini_mc", "--limit", 4, "--include-path", TASKS, "--engine", "hf"]
        result = sweep(folder, out, "--peer", "gptq", *tasks, "--model-arg", "device=cpu")
        assert result.exit_code == 0, result.output
        reference, same = report_of(out).rows
        assert reference.tasks["mini_mc"].items == 4
        assert same.tasks == reference.tasks  # it is the same model
        if reference.tasks["mini_mc"].score:
            assert same.recovery is not None
            assert same.recovery.mean == pytest.approx(1)
        assert (out / "tasks.json").exists()


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ([], "Nothing to make: give --bpw, --peer or --also."),
            (["--bpw", "4.25,x"], "--bpw x: expected bits per weight"),
            (["--bpw", "4.5,4.5"], "svsk-4.5: asked for twice"),
            (["--peer", "GPTQ"], "--peer GPTQ: expected names separated by commas"),
            (
                ["--bpw", "5", "--tables", "dense"],
                "--tables dense: expected one of these: own, ref",
            ),
            (["--also", "nothing"], "nothing"),
        ],
    )
    def test_at_once(self, folder: Path, tmp_path: Path, options: list[str], said: str) -> None:
        result = sweep(folder, tmp_path / "out", *options)
        assert result.exit_code == 1
        assert said in result.output
        assert not (tmp_path / "out").exists()

    def test_a_folder_of_something_else(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").touch()
        result = sweep(folder, tmp_path, "--bpw", "5")
        assert result.exit_code == 1
        assert "exists and holds no sweep" in result.output
        assert {path.name for path in tmp_path.iterdir()} == {"mine.txt"}

    def test_other_settings(self, tmp_path: Path) -> None:
        claim_folder(tmp_path, {"chunks": 3, "text": {"name": "a"}})
        claim_folder(tmp_path, {"chunks": 3, "text": {"name": "a"}})
        with pytest.raises(
            EvalError,
            match=r"holds a sweep with other settings: chunks was 3 and is 4. Give the sett",
        ):
            claim_folder(tmp_path, {"chunks": 4, "text": {"name": "a"}})

    def test_a_peer_says_why_before_anything_is_made(
        self, folder: Path, tmp_path: Path, quantized: list[str]
    ) -> None:
        result = sweep(folder, tmp_path / "out", "--bpw", "5", "--peer", "nothing")
        assert result.exit_code == 1
        assert "nothing: nothing: no such peer. There are gptq, awq" in result.output
        assert re.search(r"What it printed is in \S+peer\.txt\.", result.output)
        assert not quantized

    def test_without_a_checkout(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(steps_module, "_PEERS", tmp_path / "peers" / "run.py")
        result = sweep(folder, tmp_path / "out", "--peer", "gptq")
        assert result.exit_code == 1
        assert "Run `svsk sweep` from the checkout's environment" in result.output


class TestVariants:
    def test_reference_tables_are_dense(self) -> None:
        made = own_variants("4.5", "published", load_recipe("best"), "reference", 64)
        assert [one.label for one in made] == ["svsk-4.5", "published"]
        for one in made:
            assert (one.recipe.tables.head, one.recipe.tables.embedding) == ("dense", "dense")
            assert one.recipe.calibration.seq_len == 64
        assert made[0].recipe.target_bpw == 4.5
        [own] = own_variants("4.5", "", load_recipe("best"), "own", 64)
        assert own.recipe.tables == load_recipe("best").tables

    def test_group_sizes_of_peers(self) -> None:
        made = peer_variants("gptq, awq:64")
        assert [(one.label, one.peer, one.group_size) for one in made] == [
            ("gptq", "gptq", None),
            ("awq-g64", "awq", 64),
        ]
