# SPDX-License-Identifier: Apache-2.0
"""Requests that would do nothing, or harm, end before any work, and leave everything as it was."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from svsk_kernels.errors import SvskError
from svsk_offline import pipeline
from svsk_offline.export.dense import restore
from svsk_offline.pipeline import Progress, quantize
from svsk_offline.preflight import (
    check_measurements,
    check_output,
    check_recipe,
    check_recipe_file,
    check_report_files,
    check_text,
)
from svsk_offline.recipe import Recipe, load_recipe, recipe_names
from svsk_offline.storage.hub import check_checkpoint, check_model
from svsk_vllm.format.targets import matches
from tests.support.light_commands import run_without_heavy_imports

LINEARS = [
    f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
] + ["lm_head"]


@pytest.fixture
def no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes drawing calibration text, the first work there is, an error."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("calibration text was drawn")

    monkeypatch.setattr(pipeline, "load_calibration", fail)


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ("re:.*k_proj$", ""),
        ("model.layers.0.mlp.gate_proj", r" \(there is model\.layers\.0\.mlp\.up_proj\)"),
        ("model.layers.1", r"has 2 below it: name them, or give 're:model\\\.layers\\\.1\\\.\.\*'"),
        (
            "up_proj",
            r"the end of 2 such as model\.layers\.0\.mlp\.up_proj: .* 're:\.\*\\\.up_proj\$'",
        ),
    ],
)
def test_entries_to_ignore_that_match_nothing(entry: str, hint: str) -> None:
    recipe = load_recipe("fast").override({"ignore": (entry,)})
    with pytest.raises(
        SvskError,
        match=rf"^--ignore {entry.replace('*', '[*]').replace('$', '[$]')}: matches no .*{hint}",
    ):
        check_recipe(recipe, LINEARS)


def test_what_recipes_say_for_all_models_need_not_fit_one() -> None:
    told: list[str] = []
    check_recipe(
        load_recipe("fast").override({"ignore": ("re:.*up_proj",)}),
        ["transformer.h.0.up_proj"],
        told.append,
    )
    assert len(told) == 1
    assert "the sink weight has no effect" in told[0]
    check_recipe(load_recipe("fast"), LINEARS, told.append)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("name", "left_alone"),
    [
        ("lm_head", False),  # tables.head says what becomes of it
        ("model.layers.3.mlp.gate", True),
        ("model.layers.3.mlp.shared_expert_gate", True),
        ("model.layers.3.block_sparse_moe.router", True),
        ("model.layers.3.self_attn.kv_b_proj", True),
        ("model.layers.3.linear_attn.in_proj_ba", True),
        ("model.layers.3.linear_attn.in_proj_a", True),
        ("model.layers.3.linear_attn.in_proj_qkvz", False),
        ("model.layers.3.mlp.gate_proj", False),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa", False),
    ],
)
def test_recipes_leave_routers_and_small_gates_alone(name: str, left_alone: bool) -> None:
    assert [matches(name, load_recipe(recipe).ignore) for recipe in recipe_names()] == [
        left_alone
    ] * len(recipe_names())


def test_a_sink_of_the_users_own_without_targets() -> None:
    recipe = load_recipe("fast").override({"sink": {"targets": ("re:.*Wqkv$", "re:.*query$")}})
    with pytest.raises(SvskError, match=r"sink\.targets .*Wqkv.*: none matches a linear layer"):
        check_recipe(recipe, LINEARS)
    check_recipe(recipe, [*LINEARS, "model.layers.0.attn.Wqkv"])
    check_recipe(recipe.override({"sink": {"weight": 0.0}}), LINEARS)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.usefixtures("no_text")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_or_a_folder_of_something_else_is_never_replaced(
    tiny_llama: Path, tiny_recipe: Recipe, tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one").write_text("precious")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    before = tree(tmp_path)
    for name, message in (
        ("file", "is a file, expected a folder to write"),
        ("broken", "is a file, expected a folder to write"),
        (
            "photos",
            "not an SVSK checkpoint, so --overwrite does not delete it"
            if overwrite
            else "pass --overwrite",
        ),
        ("other", "not an SVSK checkpoint" if overwrite else "pass --overwrite"),
        ("file/out", "file is a file, so no folder can be made below it"),
    ):
        with pytest.raises(SvskError, match=message):
            quantize(tiny_llama, tmp_path / name, tiny_recipe, overwrite=overwrite)
    for name in ("file", "photos"):
        with pytest.raises(
            SvskError, match="file, expected a folder" if name == "file" else "overwrite"
        ):
            restore(tmp_path / "nothing", tmp_path / name, overwrite=overwrite)
    assert tree(tmp_path) == before


def test_a_folder_in_the_place_of_the_unfinished_run_is_never_deleted(
    tiny_llama: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "one").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(
            SvskError, match=r"out\.partial: holds something that is not an unfinished run"
        ):
            quantize(tiny_llama, tmp_path / "out", tiny_recipe, overwrite=overwrite)
    assert (tmp_path / "out.partial" / "one").read_text() == "precious"


def test_what_may_be_replaced(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "below" / "new", overwrite=False)
    check_output(tmp_path, overwrite=True)  # empty
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    check_output(tmp_path, overwrite=True, dense=True)
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "svsk"}})
    )
    check_output(tmp_path, overwrite=True)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(SvskError, match="something that is not a model"):
        check_output(tmp_path, overwrite=True, dense=True)


@pytest.mark.usefixtures("no_text")
def test_a_run_refuses_before_it_draws_text(
    tiny_llama: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    out, told = tmp_path / "out", Progress()
    for options, message in (
        (
            {"recipe": tiny_recipe.override({"ignore": ("re:.*typo",)})},
            "--ignore re:.*typo: matches no linear layer",
        ),
        ({"calibration": "missing.txt"}, "missing.txt: no such file"),
        ({"chat_template": True}, "--chat-template has no effect"),
        ({"device": "nonsense"}, "--device nonsense: not usable here"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"recipe": tiny_recipe.override({"ignore": ("re:.*k_proj",)})}, "k_proj"),
    ):
        arguments: dict[str, Any] = {"recipe": tiny_recipe, "progress": told, **options}
        with pytest.raises(SvskError) as caught:
            quantize(tiny_llama, out, **arguments)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_report_files(tmp_path: Path) -> None:
    check_report_files(json=None, html=tmp_path / "page.html")
    with pytest.raises(SvskError, match=r"--json .*its folder does not exist"):
        check_report_files(json=tmp_path / "no" / "x.json")
    with pytest.raises(SvskError, match=r"--html .*it is a folder"):
        check_report_files(html=tmp_path)


def test_what_can_be_told_at_once_is_told_before_heavy_imports(tmp_path: Path) -> None:
    """So within two seconds on any machine: torch alone takes longer on some."""
    (tmp_path / "file").write_text("")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    for name in ("model", "empty", "quantised", "stopped.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    declared = {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(declared))
    asked = load_recipe("fast").override({"calibration": {"samples": 64}}).values()
    (tmp_path / "stopped.partial" / "svsk-state.json").write_text(json.dumps({"asked": asked}))
    lines = (
        "quantize some/model file --overwrite",
        "quantize some/model out --calibration missing.txt",
        "restore some-folder file --overwrite",
        "export some-folder out --to onnx",
        "export some-folder file --to gguf",
        "export some-folder out.gguf --to gguf --template missing.gguf",
        "eval some/model --text missing.txt",
        "eval some/model --text file --json nowhere/x.json",
        "bench some/model --reference other --html nowhere/x.html",
        "compare file --markdown nowhere/x.md",
        "tune some/model out.yaml --calibration missing.txt",
        "tune some/model out.json",
        "tune some/model file.yaml --work-dir file",
        "tune some/model out.yaml --recipe bset",
        "sweep some/model file --text file --bpw 4.5",
        "generate some/model --prompt a --engine tgi",
        "validate nowhere",
        "validate model",
        "inspect model",
        "restore model out",
        "quantize some/model out --recipe bset",
        "quantize some/model out --recipe fast --target-bpw 3",
        "quantize some/model out --group-size 128",
        "quantize some/model out --device gpu",
        "quantize some/model out --dtype int8",
        "quantize ./nowhere out",
        "quantize model.gguf out",
        "quantize model/config.json out",
        "quantize empty out",
        "quantize quantised out",
        "quantize model stopped --recipe fast --samples 16",
        "eval nowhere/at/all --text file",
        "bench x=./nowhere --reference model",
    )
    run = run_without_heavy_imports(lines, tmp_path, 1)
    assert run.stderr.count("error:") == len(lines)
    for said in (
        "Did you mean best?",
        "model.gguf: is a GGUF file, which is not read here. Give the folder",
        "model/config.json: is a file of a model's folder. Give the folder: model",
        "empty: has no config.json, so it is no model's folder.",
        "quantised: is quantised already (gptq)",
        "calibration.samples: 64 there, 16 here",
        "--group-size 128: expected one of these: 16, 32, 64.",
    ):
        assert said in run.stderr, said


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda at: check_output(at / "file", overwrite=True), "a folder to write. Choose another"),
        (
            lambda at: check_output(at, overwrite=False),
            " exists. Choose another folder, or pass --overwrite to replace it.",
        ),
        (lambda at: check_measurements(at / "file", ()), "--measurements .*file: is a file, expec"),
        (
            lambda at: check_measurements(at / "a", (at,)),
            "--measurements .*a: overlaps .*Choose another folder",
        ),
        (
            lambda at: check_recipe_file(at / "no" / "a.yaml", overwrite=False),
            "yaml: its folder does not exist",
        ),
        (lambda at: check_text(at / "no.txt"), "no.txt: no such file. Name a plain text file"),
        (lambda at: check_text(at), "is not a regular file. Name a plain text file"),
        (
            lambda at: check_report_files(json=at / "no" / "x.json"),
            "--json .*: cannot be written, its folder does not exist",
        ),
        (lambda at: check_model(f"{at}/a.gguf"), "a.gguf: no such file; and it names"),
        (
            lambda at: check_checkpoint(at / "no"),
            "no: no such folder. Name one that `svsk quantize`",
        ),
    ],
)
def test_what_cannot_be_read_or_written_is_named(
    tmp_path: Path, check: Callable[[Path], object], message: str
) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SvskError, match=message):
        check(tmp_path)
    assert (tmp_path / "file").read_text() == "precious"


def test_folders_without_permission_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so that a mode would not do."""
    asked: list[tuple[Path, int]] = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((Path(path), mode)))
    with pytest.raises(SvskError, match=rf"out: {tmp_path} cannot be written. Choose a folder in"):
        check_output(tmp_path / "new" / "out", overwrite=False)
    with pytest.raises(SvskError, match=r"a\.yaml: its folder cannot be written. Choose a file in"):
        check_recipe_file(tmp_path / "a.yaml", overwrite=False)
    assert asked == [(tmp_path, os.W_OK)] * 2
