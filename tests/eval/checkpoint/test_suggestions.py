# SPDX-License-Identifier: Apache-2.0
"""What is suggested of a checkpoint, and the figures of its contents that it rests on."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from svsk_eval.checkpoint.contents import CheckpointContents, DenseTable
from svsk_eval.checkpoint.suggestions import suggestions
from svsk_eval.checkpoint.tables import place_table
from svsk_eval.text.by_token import TokenGroup
from tests.eval.checkpoint.made_up import made_up, matrix


def said(contents: CheckpointContents, kinds: Sequence[TokenGroup] = ()) -> dict[str, str]:
    return {one.rule: one.text for one in suggestions(contents, kinds)}


PLAIN = tuple(matrix(f"h.{number}.down") for number in range(6))


def test_nothing_is_suggested_where_nothing_stands_out() -> None:
    even = TokenGroup("digits", 100, 0.1, 0.01, 0.5)
    assert said(made_up(PLAIN), [even, replace(even, name="word start")]) == {}
    table = replace(PLAIN[0], name="embed", block=None, rank=0, held_out_tokens=0)
    assert said(made_up((*PLAIN, table))) == {}  # an embedding reads no activations


def test_every_suggestion_says_its_figure() -> None:
    far = said(made_up((*PLAIN[:5], matrix("h.5.down", error=9e-3, base_error=2e-2))))
    assert set(far) == {"largest-errors"}
    assert (
        "1 of 6 matrices is over 4 times the median 1.0e-03: h.5.down 9.0e-03"
        in far["largest-errors"]
    )
    assert f"{64 * 128 * 11.5 / 8e6:.3g} MB more" in far["largest-errors"]
    idle = said(made_up((*PLAIN[:5], matrix("h.5.down", base_error=1.05e-3))))
    assert "The sidecars of 1 of 6 matrices" in idle["idle-sidecars"]
    assert "h.5.down 4.8%" in idle["idle-sidecars"]
    assert f"{0.5 / 6:.3f} bits per weight" in idle["idle-sidecars"]
    fitted = said(made_up((*PLAIN[:5], matrix("h.5.down", held_out_tokens=0))))
    assert "The errors of 1 matrix were measured on the tokens" in fitted["few-held-out"]
    few = said(made_up((*PLAIN[:5], matrix("h.5.down", held_out_tokens=32))))
    assert "h.5.down on 0.25 per input (32 for 128)" in few["few-held-out"]
    blind = said(made_up((*PLAIN[:5], matrix("h.5.down", error=None, base_error=None))))
    assert "1 of 6 matrices have no measured error, such as h.5.down" in blind["unmeasured"]


def test_budgets_texts_and_tables_are_held_against_what_was_stored() -> None:
    for target, words in ((4.6, "0.1000 were left over"), (4.3, "0.2000 more than asked for")):
        recipe = {"method": "alternating", "allocation": {"target_bpw": target}}
        off = said(made_up(PLAIN, inspection={"producer": {"recipe_values": recipe}}))
        assert f"4.5000 bits per weight are stored, {target} is the recipe's" in off["budget"]
        assert words in off["budget"]
    calibration = {"samples": 8, "seq_len": 128, "held_out": 1}
    recipe = {"method": "alternating"}
    producer = {"recipe_values": recipe, "calibration": calibration}
    short = said(made_up(PLAIN, inspection={"producer": producer}))
    assert "Fitted to 896 tokens, 7.0 per input of h.0.down" in short["few-calibration-tokens"]
    recipe["method"] = "published"  # needs no number of tokens
    assert said(made_up(PLAIN, inspection={"producer": producer})) == {}
    table = DenseTable("embed", (1000, 128), 256_000)
    dense = said(made_up(PLAIN, dense_tables=(table,), dense_bytes=256_000))
    share = 256_000 / (256_000 + 6 * 64 * 128 * 4.5 / 8)
    assert f"embed is dense: 0.3 MB, {share:.0%} of the stored weights" in dense["dense-tables"]
    assert "it would be 0.1 MB" in dense["dense-tables"]
    odd = DenseTable("embed", (1000, 100), 200_000)  # no groups of 64: it cannot be int8
    assert said(made_up(PLAIN, dense_tables=(odd,), dense_bytes=200_000)) == {}


def test_a_budget_that_includes_the_head_counts_it() -> None:
    head = replace(PLAIN[0], name="lm_head", block=None, shape=(128, 128), code_bits=8 * 128 * 128)
    embedding = replace(head, name="embed")
    recipe = {"method": "alternating", "allocation": {"target_bpw": 5.0, "includes": ["head"]}}
    config = {"quantization_config": {"embedding": {"module": "embed"}}}
    contents = made_up(
        (*PLAIN, head, embedding),
        inspection={"producer": {"recipe_values": recipe}},
        hf_config=config,
    )
    stored = 6 * 64 * 128 * 4.5 + head.stored_bits
    assert contents.bits_per_weight == pytest.approx(stored / (6 * 64 * 128 + 128 * 128))
    tied = replace(contents, matrices=(*PLAIN, embedding))
    assert tied.bits_per_weight == contents.bits_per_weight
    recipe["allocation"] = {"target_bpw": 5.0}
    assert contents.bits_per_weight == pytest.approx(4.5)


def test_kinds_of_tokens_count_beyond_their_errors() -> None:
    words = TokenGroup("word start", 900, 0.1, 0.01, 0.5)
    special = TokenGroup("special", 100, 1.0, 0.1, 0.5)
    text = said(made_up(PLAIN), [words, special])["kinds-of-tokens"]
    assert "KL is 1.0000 at special tokens, 5.3 times the 0.1900 of all tokens, and 50%" in text
    assert "(100 of 1,000 tokens). Calibrate on conversations" in text
    assert said(made_up(PLAIN), [words, replace(special, kl_se=0.4)]) == {}
    assert said(made_up(PLAIN), [words, replace(special, kl_se=None)]) == {}
    assert said(made_up(PLAIN), [words, replace(special, share=0.04)]) == {}


def test_experts_are_one_kind_and_one_row() -> None:
    experts = [
        matrix(f"h.0.experts.{number}.up", kind="experts.*.up", error=(number + 1) * 1e-3)
        for number in range(3)
    ]
    contents = made_up(experts)
    assert list(contents.kinds) == ["experts.*.up"]
    (place,) = contents.places
    assert place.error == pytest.approx(2e-3)
    table = place_table(contents)
    assert table is not None
    ((row,),) = table.groups
    assert row == ("0", "experts.*.up", "4.5000", "64", "8", "2.00e-03", "2.00e-03")
