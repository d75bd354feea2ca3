# SPDX-License-Identifier: Apache-2.0
"""``mixed-int8``: which rows of a table have 8 bits, how all are rounded, what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from svsk_kernels.errors import SvskError
from svsk_offline.calibration import load_calibration
from svsk_offline.cli import app
from svsk_offline.export.dense import restore
from svsk_offline.pipeline import Progress, quantize
from svsk_offline.quantizers.eight_bits import round_to_eight_bits
from svsk_offline.quantizers.hot_rows import common_tokens, round_with_hot_rows
from svsk_offline.recipe import Recipe, load_recipe, parse_recipe
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.inspection import inspect_checkpoint, validate_against_architecture
from svsk_offline.terminal import console
from svsk_vllm.format import Checkpoint, LinearSpec, ShardedReader, dequantize
from tests.offline.folders import folder_bytes
from tests.offline.quantizers.plain import quantize_rtn
from tests.support.format_builders import EMBEDDING, HEAD, edit_json, make_group
from tests.support.interruptions import stop_before_tables
from tests.support.tiny_models import BOS, EOS, PAD

CPU = torch.device("cpu")
KIND = "mixed-int8"


def recipe_of(head: str, embedding: str = "auto", hot_rows: int = 60) -> Recipe:
    return load_recipe("fast").override(
        {
            "calibration": {"samples": 16, "seq_len": 64},
            "sidecar": {"rank": 2},
            "tables": {"head": head, "embedding": embedding, "hot_rows": hot_rows},
        }
    )


def test_common_tokens_come_first_and_of_equal_ones_the_lower_number() -> None:
    tokens = torch.tensor([[7, 7, 7, 2], [9, 9, 4, 4]])
    found = [common_tokens(tokens, (), 12, count).tolist() for count in (1, 2, 3, 4, 6)]
    assert found == [[7], [4, 7], [4, 7, 9], [2, 4, 7, 9], [0, 1, 2, 4, 7, 9]]
    assert common_tokens(tokens, (11, 3), 12, 3).tolist() == [3, 7, 11]
    assert common_tokens(tokens, (11, 3), 12, 1).tolist() == [3], "as common as any can be"


def test_hot_rows_are_those_of_eight_bits_and_the_others_better_than_plain_rounding() -> None:
    weight = torch.randn(300, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[5] = 0
    hot = torch.arange(0, 300, 7, dtype=torch.int32)
    scheme = make_group(targets=["m"], group_size=32, hot_rows=len(hot))
    linear = round_with_hot_rows(weight, LinearSpec("m", 300, 96, scheme), hot, CPU)
    eight = make_group(targets=["m"], group_size=32, codebook="int8")
    whole = round_to_eight_bits(weight, LinearSpec("m", 300, 96, eight))
    assert linear.hot is hot
    assert torch.equal(linear.codes[hot.long()], whole.codes[hot.long()])
    assert torch.equal(linear.scale[hot.long()], whole.scale[hot.long()])
    others = torch.ones(300, dtype=torch.bool)
    others[hot.long()] = False
    assert int(linear.codes[others].abs().max()) == 8
    linear.to_tensors()  # checks the codes' range
    codes, scale = quantize_rtn(weight.float(), 32, "int4", torch.bfloat16)
    plain = (codes.unflatten(1, (-1, 32)) * scale.float().unsqueeze(-1)).flatten(1)
    error = (dequantize(linear) - weight.float())[others].square().mean()
    assert float(error) < 0.8 * float((plain - weight.float())[others].square().mean())
    assert not dequantize(linear)[5].any()


def test_values_beyond_the_scales_dtype_are_refused() -> None:
    scheme = make_group(targets=["m"], hot_rows=1)
    weight = torch.zeros(4, 64)
    weight[2, 5] = 1e6
    for hot in (0, 2):  # among the others, and hot
        with pytest.raises(SvskError, match=r"m\.weight: .* not finite in torch\.float16"):
            round_with_hot_rows(
                weight,
                LinearSpec("m", 4, 64, scheme, torch.float16),
                torch.tensor([hot], dtype=torch.int32),
                CPU,
            )


@pytest.mark.parametrize(
    ("model", "head", "embedding", "mixed", "tied"),
    [
        ("tiny_llama", KIND, "auto", [EMBEDDING], True),
        ("tiny_llama", "auto", KIND, [EMBEDDING], True),
        ("tiny_llama", "svsk", KIND, [EMBEDDING], False),
        ("tiny_qwen2", KIND, KIND, [EMBEDDING, HEAD], False),
        ("tiny_qwen2", "int8", KIND, [EMBEDDING], False),
        ("tiny_qwen2", KIND, "dense", [HEAD], None),
    ],
)
def test_what_is_stored(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    model: str,
    head: str,
    embedding: str,
    mixed: list[str],
    tied: bool | None,
) -> None:
    dense: Path = request.getfixturevalue(model)
    out, said = tmp_path / "out", list[str]()
    result = quantize(
        dense, out, recipe_of(head, embedding), progress=Progress(message=said.append)
    )
    assert validate_against_architecture(out) == []
    checkpoint = Checkpoint(out)
    assert checkpoint.config.version == "1.1"
    declared = checkpoint.config.embedding
    assert (declared and declared.tied) == tied
    hot = {name: spec.scheme.weights.hot_rows for name, spec in checkpoint.linears.items()}
    assert {name for name, count in hot.items() if count} == set(mixed)
    for name in mixed:
        report = next(report for report in result.tables if report.name == name)
        assert report.bits_per_weight == 4.25 + (4 + 32 / 128) * 60 / 320
        assert any(line.startswith(f"{name}: the 60 rows in 8 bits are those of") for line in said)
    restored = ShardedReader(restore(out, tmp_path / "restored"))
    linear = checkpoint.read_linear(mixed[0])
    assert torch.equal(restored.read(f"{mixed[0]}.weight"), dequantize(linear).bfloat16())


def test_the_rows_are_those_of_the_fitted_samples(tmp_path: Path, tiny_llama: Path) -> None:
    said: list[str] = []
    recipe, progress = recipe_of(KIND), Progress(message=said.append)
    quantize(tiny_llama, tmp_path / "out", recipe, progress=progress)
    linear = Checkpoint(tmp_path / "out").read_linear(EMBEDDING)
    assert linear.hot is not None
    found = set(linear.hot.tolist())
    tokens = load_calibration("default", ModelSource(tiny_llama).tokenizer, 16, 64, 0).tokens
    fitted = [token for i, row in enumerate(tokens.tolist()) if i % 8 != 7 for token in row]
    held = [token for i, row in enumerate(tokens.tolist()) if i % 8 == 7 for token in row]
    special = {PAD, EOS, BOS}
    assert special <= found
    ranked = sorted(set(range(320)) - special, key=lambda token: (-fitted.count(token), token))
    assert found == special | set(ranked[:57])
    share = sum(token in found for token in held) / len(held)
    assert 0.5 < share < 1
    assert any(f"are those of {share:.1%} of the held-out tokens" in line for line in said)


def test_what_ends_an_answer_is_special(tmp_path: Path, tiny_llama: Path) -> None:
    """Models name such tokens in generation_config.json, which tokenizers need not know."""
    dense = Path(shutil.copytree(tiny_llama, tmp_path / "dense"))
    assert ModelSource(dense).special_tokens == {PAD, EOS, BOS}
    edit_json(dense / "generation_config.json", lambda c: c.update(eos_token_id=[EOS, 300]))
    assert ModelSource(dense).special_tokens == {PAD, EOS, BOS, 300}
    edit_json(dense / "config.json", lambda c: c.update(eos_token_id=None))
    (dense / "generation_config.json").unlink()
    assert ModelSource(dense).special_tokens == {PAD, EOS, BOS}


def test_an_interrupted_run_writes_the_same(tmp_path: Path, tiny_llama: Path) -> None:
    quantize(tiny_llama, tmp_path / "a", recipe_of(KIND))
    stop_before_tables(tiny_llama, tmp_path / "b", recipe_of(KIND))
    quantize(tiny_llama, tmp_path / "b", recipe_of(KIND))
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_inspection_counts_them(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(tiny_llama, tmp_path / "out", recipe_of(KIND))
    inspection = inspect_checkpoint(tmp_path / "out")
    (row,) = [row for row in inspection["groups"] if row["kind"] == "embed_tokens"]
    assert (row["hot_rows"], row["codebook"], row["shape"]) == (60, "int4", [320, 128])
    assert row["bits"]["weight_hot_packed"] == 60 * 128 * 8
    assert all(
        row["hot_rows"] == 0 for row in inspection["groups"] if row["kind"] != "embed_tokens"
    )
    monkeypatch.setattr(console, "width", 200)  # it was made when its module was first imported
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert "int4 g64 s16, 60 rows int8" in result.output


def test_more_rows_than_there_are_is_refused(tmp_path: Path, tiny_qwen2: Path) -> None:
    for name, recipe in (
        (HEAD, recipe_of(KIND, "dense", 320)),
        (EMBEDDING, recipe_of("dense", KIND, 320)),
    ):
        with pytest.raises(
            SvskError,
            match=rf"{name}\.weight: has 320 rows, of which mixed-int8 is to store 320 .*"
            r"\(tables\.hot_rows\)\. Say fewer \(--hot-rows 40\), or int8",
        ):
            quantize(tiny_qwen2, tmp_path / "out", recipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hot-rows", "50"], "--hot-rows: no effect without a table that is mixed-int8."),
        (["--head", KIND, "--hot-rows", "0"], "tables.hot_rows: expected at least 1, got 0."),
        (["--head", KIND, "--embedding", "int8"], "are one matrix. Leave --embedding out, or say"),
        (["--head", "int8", "--embedding", KIND], "say --embedding int8."),
        (["--head", KIND], "model.embed_tokens.weight: has 320 rows, of which mixed-int8 is to"),
    ],
)
def test_options_that_cannot_be(
    tmp_path: Path, tiny_llama: Path, arguments: list[str], message: str
) -> None:
    command = ["quantize", str(tiny_llama), str(tmp_path / "out"), *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tables": {"hot_rows": 5}}, r"tables\.hot_rows: no effect without a table that is mixed"),
        ({"tables": {"head": KIND, "hot_rows": 5, "rank": 4}}, r"tables\.rank: no effect with"),
        ({"weights": {"hot_rows": 5}}, r"weights: .*hot_rows 5: of tables only\. Say tables\.hot"),
    ],
)
def test_recipes_that_cannot_be(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(SvskError, match=message):
        parse_recipe({"name": "x", "method": "published", **keys}, "x.yaml")


def test_recipes_without_such_a_table_do_not_change(tmp_path: Path) -> None:
    """Their digest is in checkpoints, and in the names of measurements that are kept."""
    assert "hot_rows" not in str(load_recipe("best").written())
    mixed = load_recipe("best").override({"tables": {"head": KIND}})
    assert mixed.written()["tables"]["hot_rows"] == 8000
    assert parse_recipe(mixed.written(), "written") == mixed
