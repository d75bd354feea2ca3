# SPDX-License-Identifier: Apache-2.0
"""What could be better about a checkpoint: each says the figure it follows from.

A rule that has nothing to say is silent.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from svsk_eval.checkpoint.contents import CheckpointContents, Matrix, nested
from svsk_eval.text.by_token import KINDS, TokenGroup

__all__ = ["Suggestion", "suggestions"]

_FAR: Final = 4.0
"""Times the median, from which a matrix's error is named."""
_NAMED: Final = 5
_LITTLE: Final = 0.1
"""Share of the base's error; a sidecar that takes less away is named."""
_OFF_BUDGET: Final = 0.02
"""Bits per weight; what a budget leaves over because ranks and groups come in steps is less."""
_ENOUGH: Final = 16.0
"""Fitted tokens per input; a recipe has this number or more, see docs/recipes.md."""
_LARGE: Final = 0.05
"""Share of the file, from which a dense table is named."""
_TABLE_BITS: Final = 8.25
"""Bits per weight of an int8 table: a 16-bit scale for 64 weights."""
_TIMES: Final = 2.0
"""Times the KL of all tokens, from which a kind of token is named, its standard errors counted."""
_WORTH: Final = 0.05
"""Share of all KL, from which a kind of token is named."""
_TEXTS: Final = {
    "special": "conversations in the chat template (--calibration chat, or rows with messages)",
    "digits": "arithmetic (--calibration arithmetic)",
    "punctuation": "code (--calibration code)",
    "whitespace": "code and conversations (--calibration code, --calibration chat)",
    "part of a character": "text in the languages and scripts that will be served",
}
"""What to calibrate on, by the kind of token."""


@dataclass(frozen=True)
class Suggestion:
    """One thing that may be worth doing.

    Attributes:
        rule: short name of what it follows from.
        text: the figure, and what to do.
    """

    rule: str
    text: str


def suggestions(contents: CheckpointContents, kinds: Sequence[TokenGroup] = ()) -> list[Suggestion]:
    """What follows from a checkpoint's figures; empty where nothing does.

    Args:
        contents: of the checkpoint.
        kinds: KL by kind of token, where a text was scored.
    """
    rules: tuple[Callable[[CheckpointContents], Iterator[str]], ...] = (
        _budget,
        _dense_tables,
        _largest_errors,
        _idle_sidecars,
        _few_calibration_tokens,
        _few_held_out,
        _unmeasured,
    )
    found = [
        Suggestion(rule.__name__.strip("_").replace("_", "-"), text)
        for rule in rules
        for text in rule(contents)
    ]
    return found + [Suggestion("kinds-of-tokens", text) for text in _kinds(kinds)]


def _budget(contents: CheckpointContents) -> Iterator[str]:
    target, spent = contents.target, contents.bits_per_weight
    if target is None or spent is None or abs(spent - target) <= _OFF_BUDGET:
        return
    figures = f"{spent:.4f} bits per weight are stored, {target:g} is the recipe's budget"
    if spent < target:
        yield (
            f"{figures}: {target - spent:.4f} were left over. Ranks and groups may all be as fine"
            " as the recipe allows: allocation.ranks and allocation.group_sizes can allow more."
        )
    else:
        yield (
            f"{figures}: {spent - target:.4f} more than asked for. The recipe's smallest choice"
            " may be above the budget; allow larger groups in allocation.group_sizes, or less"
            " precise scales in allocation.scale_bits."
        )


def _dense_tables(contents: CheckpointContents) -> Iterator[str]:
    quantised = sum(one.stored_bits for one in contents.matrices) // 8
    whole = quantised + contents.dense_bytes
    for table in contents.dense_tables:
        rows, width = table.shape
        smaller = rows * width * _TABLE_BITS / 8
        # groups of 64 are what an int8 table needs
        if table.num_bytes < _LARGE * whole or smaller >= table.num_bytes or width % 64:
            continue
        yield (
            f"{table.name} is dense: {table.num_bytes / 1e6:.1f} MB, {table.num_bytes / whole:.0%}"
            f" of the stored weights. In 8 bits it would be {smaller / 1e6:.1f} MB, near lossless"
            " (0.0003 of KL for SmolLM2, docs/benchmarks/tables.md): --head int8, --embedding int8."
        )


def _largest_errors(contents: CheckpointContents) -> Iterator[str]:
    known = [(one, one.error) for one in contents.in_blocks if one.error is not None]
    if not known:
        return
    middle = median(error for _, error in known)
    far = [(one, error) for one, error in known if error > _FAR * middle]
    if not far or middle <= 0:
        return
    far.sort(key=lambda pair: -pair[1])
    named = ", ".join(f"{one.name} {error:.1e}" for one, error in far[:_NAMED])
    worst = far[0][0]
    more = worst.weights * (16 - worst.bits_per_weight) / 8e6
    each = "" if contents.target is not None else " or a bit budget (--target-bpw)"
    yield (
        f"The error of {len(far)} of {len(known)} matrices is over {_FAR:g} times the median"
        f" {middle:.1e}: {named}{', ...' if len(far) > _NAMED else ''}. More calibration text like"
        f" what is served{each} may help; --ignore keeps a matrix as it is, which for"
        f" {worst.name} takes {more:.3g} MB more."
    )


def _idle_sidecars(contents: CheckpointContents) -> Iterator[str]:
    judged = [one for one in contents.in_blocks if one.removed is not None]
    idle = [one for one in judged if (one.removed or 0.0) < _LITTLE]
    if not idle:
        return
    bits = sum(one.sidecar_bits for one in idle)
    weights = sum(one.weights for one in contents.in_blocks)
    instead = (
        "A bit budget (--target-bpw) chooses a rank for each matrix, 0 among them."
        if contents.target is None
        else "The budget expected more of them: more calibration text makes its estimates better."
    )
    yield (
        f"The sidecars of {len(idle)} of {len(judged)} matrices take away less than {_LITTLE:.0%}"
        f" of the base's error, {idle[0].name} {idle[0].removed or 0.0:.1%}. Together they are"
        f" {bits / 8e6:.2f} MB, {bits / weights:.3f} bits per weight of the blocks. {instead}"
    )


def _few_calibration_tokens(contents: CheckpointContents) -> Iterator[str]:
    if nested(contents.recipe, "method", kind=str) != "alternating" or not contents.in_blocks:
        return  # the original method has no Hessian, and needs no number of tokens
    record = nested(contents.producer, "calibration", kind=dict) or {}
    samples, length = (nested(record, key, kind=int) for key in ("samples", "seq_len"))
    if not samples or not length:
        return
    fitted = (samples - (nested(record, "held_out", kind=int) or 0)) * length
    widest = max(contents.in_blocks, key=lambda one: one.shape[1])
    per_input = fitted / widest.shape[1]
    if 0 <= per_input < _ENOUGH:
        yield (
            f"Fitted to {fitted:,} tokens, {per_input:.1f} per input of {widest.name}, which has"
            f" {widest.shape[1]}. Below {_ENOUGH:g} errors on other text grow; leave --samples out"
            " and give more text."
        )


def _few_held_out(contents: CheckpointContents) -> Iterator[str]:
    known = [one for one in contents.in_blocks if one.error is not None]
    fitted = [one for one in known if one.held_out_tokens == 0]
    if fitted:
        yield (
            f"The errors of {_matrices(fitted)} were measured on the tokens they were fitted to,"
            " and are too small. With two calibration samples or more some are held out."
        )
    few = [one for one in known if 0 < (one.held_out_tokens or 0) < one.shape[1]]
    if few:
        least = min(few, key=lambda one: _per_input(one))
        yield (
            f"The errors of {_matrices(few)} were measured on fewer held-out tokens than"
            f" there are inputs, {least.name} on {_per_input(least):.2f} per input"
            f" ({least.held_out_tokens:,} for {least.shape[1]}): take them as rough, and give more"
            " calibration samples, an eighth of which is held out."
        )


def _matrices(found: Sequence[Matrix]) -> str:
    return "1 matrix" if len(found) == 1 else f"{len(found)} matrices"


def _per_input(matrix: Matrix) -> float:
    return (matrix.held_out_tokens or 0) / matrix.shape[1]


def _unmeasured(contents: CheckpointContents) -> Iterator[str]:
    missing = [one for one in contents.matrices if one.error is None]
    if contents.with_errors and missing:
        yield (
            f"{len(missing)} of {len(contents.matrices)} matrices have no measured error, such as"
            f" {missing[0].name}: no held-out token reached them. More samples, or text of other"
            " kinds, would."
        )


def _kinds(kinds: Sequence[TokenGroup]) -> Iterator[str]:
    tokens = sum(group.tokens for group in kinds)
    if not tokens:
        return
    overall = sum(group.kl * group.tokens for group in kinds) / tokens
    for group in kinds:
        sure = group.kl_se is not None and group.kl - 2 * group.kl_se > _TIMES * overall
        if sure and (group.share or 0.0) >= _WORTH and group.name in _TEXTS:
            yield (
                f"KL is {group.kl:.4f} at {KINDS[group.name]}, {group.kl / overall:.1f} times the"
                f" {overall:.4f} of all tokens, and {group.share:.0%} of it is there"
                f" ({group.tokens:,} of {tokens:,} tokens). Calibrate on {_TEXTS[group.name]}."
            )
