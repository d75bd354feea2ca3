# SPDX-License-Identifier: Apache-2.0
"""Tables and facts of a checkpoint's report, which console and page each draw in their own way."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any, Final

from svsk_eval.checkpoint.contents import CheckpointContents, Matrix, Place, nested
from svsk_eval.report.cells import DASH, Table, make_table, number, percent, plus_minus
from svsk_eval.text.by_token import KINDS, TokenGroup
from svsk_offline.storage.inspection import smoothing_lines

__all__ = [
    "TextFigures",
    "bit_tables",
    "error_tables",
    "facts",
    "kind_summaries",
    "place_table",
    "text_tables",
]

_WORST: Final = 10
_MOST_KINDS: Final = 60
_MOST_PLACES: Final = 1500
"""Rows of a table; a page stays below 1 MB."""
_LONGEST: Final = 300
"""Characters of a word that config.json says."""

_SCORES: Final = (
    ("kl_mean", "KL(reference || model), mean", ".5f"),
    ("kl_p99", "KL, 99th percentile", ".4f"),
    ("delta_nll", "delta NLL", "+.5f"),
    ("top1", "same top token", ".4f"),
    ("nll", "NLL", ".5f"),
    ("ref_nll", "NLL of the reference", ".5f"),
    ("ppl", "perplexity", ".4f"),
)


@dataclass(frozen=True)
class TextFigures:
    """What was scored of a checkpoint on a text, against its reference.

    Attributes:
        text: name of the file.
        scores: what ``svsk eval --json`` writes.
        kinds: KL by kind of token.
        positions: KL by the number of tokens read before.
    """

    text: str
    scores: Mapping[str, Any]
    kinds: Sequence[TokenGroup]
    positions: Sequence[TokenGroup]


def facts(contents: CheckpointContents) -> list[tuple[str, str]]:
    """What the checkpoint is: names and values in words."""
    inspection, producer = contents.inspection, contents.producer
    counted = contents.bits_per_weight
    target = "" if contents.target is None else f", of a budget of {contents.target:g}"
    if counted != inspection["bits_per_weight"]:
        target = f"; {number(counted, '.4f')} with the output head{target}"
    digest = producer.get("recipe_hash")
    recipe = _word(producer.get("recipe")) + (f" ({_word(digest)[:12]})" if digest else "")
    whole = inspection["bits_per_weight_of_all"]
    on_disk, dense = inspection["bytes_on_disk"], contents.dense_bytes
    rows = [
        ("checkpoint", contents.folder.resolve().name),
        ("model", ", ".join(map(str, _architectures(contents)))),
        ("bits per weight, blocks", f"{number(inspection['bits_per_weight'], '.4f')}{target}"),
        ("bits per weight, all", f"{whole:.4f}, tensors kept as they were among them"),
        ("size", f"{on_disk / 1e6:.1f} MB, of which {dense / 1e6:.1f} MB kept as they were"),
        (
            "quantised",
            f"{inspection['linears']} matrices, {inspection['quantized_weights']:,} weights",
        ),
        ("recipe", recipe),
        ("calibration", _calibration(producer.get("calibration"))),
        *(("smoothing", line) for line in smoothing_lines(producer.get("smoothing"))),
        ("written by", f"svsk {_word(producer.get('svsk'))}, format {inspection['version']}"),
    ]
    return [(name, value) for name, value in rows if value]


def _architectures(contents: CheckpointContents) -> list[Any]:
    named = nested(contents.hf_config, "architectures", kind=list)
    return named or [_word(contents.hf_config.get("model_type"))]


def _word(value: Any) -> str:
    word = "unknown" if value is None else str(value)
    return word if len(word) <= _LONGEST else f"{word[:_LONGEST]}..."


def _calibration(record: Any) -> str:
    """What config.json says of the text, its parts with their weights."""
    if not isinstance(record, Mapping):
        return _word(record)
    held_out = record.get("held_out")
    line = (
        f"{_word(record.get('source'))}, {_word(record.get('samples'))} samples of"
        f" {_word(record.get('seq_len'))} tokens"
    )
    line += f", {held_out} of them held out" if held_out else ""
    parts = nested(record, "parts", kind=list) or []
    named = [
        f"{_word(part.get('source'))} {_word(part.get('samples'))}"
        for part in parts
        if isinstance(part, Mapping)
    ]
    return f"{line}: {', '.join(named)}" if named else line


def bit_tables(contents: CheckpointContents) -> list[Table]:
    """The tables about bits, without those that would be empty."""
    made = (_parts(contents), _choices(contents))
    return [table for table in made if table is not None]


def error_tables(contents: CheckpointContents) -> list[Table]:
    """The tables about each kind of matrix and its errors, without those that would be empty."""
    made = (_kinds(contents), _worst(contents), _table_errors(contents))
    return [table for table in made if table is not None]


def _parts(contents: CheckpointContents) -> Table:
    """Where the bytes are."""
    blocks, outside = contents.in_blocks, contents.tables
    dense_tables = sum(table.num_bytes for table in contents.dense_tables)
    parts = {
        "blocks: codes of the base": sum(one.code_bits for one in blocks) / 8,
        "blocks: scales": sum(one.scale_bits for one in blocks) / 8,
        "blocks: sidecars": sum(one.sidecar_bits for one in blocks) / 8,
        "embedding and output head, quantised": sum(one.stored_bits for one in outside) / 8,
        "embedding and output head, dense": dense_tables,
        "other dense tensors": contents.dense_bytes - dense_tables,
        "tokenizer, config and other files": contents.other_files,
    }
    whole = sum(parts.values())
    weights = {
        "blocks": sum(one.weights for one in blocks),
        "embedding and output head, quantised": sum(one.weights for one in outside),
    }
    rows = [
        (
            name,
            f"{size / 1e6:.2f}",
            percent(size / whole),
            _per_weight(8 * size, weights.get(name.partition(":")[0])),
        )
        for name, size in parts.items()
        if size
    ]
    note = "Every stored bit; MB are millions of bytes."
    headings = ("MB", "share", "bits per weight")
    return make_table("Where the bytes are", ("part",), headings, _single(rows), note)


def _per_weight(bits: float, weights: int | None) -> str:
    return f"{bits / weights:.4f}" if weights else DASH


def kind_summaries(
    contents: CheckpointContents,
) -> dict[str, tuple[float | None, float | None]]:
    """Errors by kind of matrix, geometric means over its matrices with errors above 0.

    Returns:
        Without the sidecar and with it, each None where nothing is kept.
    """
    return {
        kind: (
            _geometric(one.base_error for one in matrices),
            _geometric(one.error for one in matrices),
        )
        for kind, matrices in contents.kinds.items()
    }


def _kinds(contents: CheckpointContents) -> Table | None:
    if not contents.kinds:
        return None
    errors = kind_summaries(contents)
    rows = []
    for kind, matrices in list(contents.kinds.items())[:_MOST_KINDS]:
        weights = sum(one.weights for one in matrices)
        base, whole = errors[kind]
        rows.append(
            (
                kind,
                str(len(matrices)),
                _span(sorted({one.shape for one in matrices}), "{0[0]} x {0[1]}"),
                f"{sum(one.stored_bits for one in matrices) / weights:.4f}",
                f"{sum(one.sidecar_bits for one in matrices) / weights:.4f}",
                number(base, ".2e"),
                number(whole, ".2e"),
                percent(_taken_away(matrices, base, whole)),
            )
        )
    note = (
        "Errors are those of the outputs, E|dW x|^2 / E|W x|^2, on tokens that nothing was fitted"
        " to, in the geometric mean: of the base alone, with the sidecar, and what the sidecar"
        " takes away." + _left_out(len(contents.kinds), _MOST_KINDS)
    )
    headings = (
        "count",
        "N x K",
        "bits per weight",
        "of which sidecar",
        "error, base",
        "with sidecar",
        "taken away",
    )
    return make_table("Kinds of matrices", ("matrix",), headings, _single(rows), note)


def _taken_away(
    matrices: Sequence[Matrix], base: float | None, whole: float | None
) -> float | None:
    """Share of the base's error; None where there is no sidecar."""
    known = base and whole is not None and any(one.rank for one in matrices)
    return 1 - whole / base if known and base and whole is not None else None


def _choices(contents: CheckpointContents) -> Table | None:
    """Group sizes and ranks, and how many matrices have each."""
    blocks = contents.in_blocks
    if not blocks:
        return None
    counts = Counter((one.codebook, one.group_size, one.rank) for one in blocks)
    weights: Counter[tuple[str, int, int]] = Counter()
    for one in blocks:
        weights[(one.codebook, one.group_size, one.rank)] += one.weights
    rows = [
        (
            f"{codebook}, groups of {group}, {f'rank {rank}' if rank else 'no sidecar'}",
            str(counts[codebook, group, rank]),
            percent(weights[codebook, group, rank] / sum(weights.values())),
            _examples(contents, (codebook, group, rank)),
        )
        for codebook, group, rank in sorted(counts, key=lambda key: (key[0], -key[1], key[2]))
    ]
    rows_shown = [(name, where, count, share) for name, count, share, where in rows[:_MOST_KINDS]]
    return make_table(
        "Groups and ranks",
        ("choice", "of which kinds"),
        ("matrices", "of the weights"),
        _single(rows_shown),
        "In the blocks." + _left_out(len(rows), _MOST_KINDS),
    )


def _examples(contents: CheckpointContents, choice: tuple[str, int, int]) -> str:
    kinds = Counter(
        one.kind.rpartition(".")[2]
        for one in contents.in_blocks
        if (one.codebook, one.group_size, one.rank) == choice
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))


def _worst(contents: CheckpointContents) -> Table | None:
    known = [(one.error, one) for one in contents.in_blocks if one.error is not None]
    if not known:
        return None
    known.sort(key=lambda pair: -pair[0])
    rows = [_error_row(one) for _, one in known[:_WORST]]
    note = "An error of an output is not yet a loss: a bit budget weighs it by what it costs."
    return make_table("Largest errors", ("matrix",), _ERROR_HEADINGS, _single(rows), note)


def _table_errors(contents: CheckpointContents) -> Table | None:
    rows = [_error_row(one) for one in contents.tables]
    if not rows:
        return None
    return make_table("Embedding and output head", ("matrix",), _ERROR_HEADINGS, _single(rows))


_ERROR_HEADINGS: Final = (
    "N x K",
    "bits per weight",
    "groups of",
    "rank",
    "error, base",
    "with sidecar",
    "taken away",
    "held-out tokens per input",
)


def _error_row(one: Matrix) -> tuple[str, ...]:
    tokens = one.held_out_tokens
    # An embedding reads none: its error is that of its rows.
    unknown = tokens is None or (tokens == 0 and one.block is None)
    measured_on = f"{(tokens or 0) / one.shape[1]:.1f}" if tokens else "fitted ones"
    return (
        one.name,
        f"{one.shape[0]} x {one.shape[1]}",
        f"{one.bits_per_weight:.4f}",
        str(one.group_size),
        str(one.rank),
        number(one.base_error, ".2e"),
        number(one.error, ".2e"),
        percent(one.removed),
        DASH if unknown else measured_on,
    )


def place_table(contents: CheckpointContents) -> Table | None:
    """Every matrix of the blocks, the experts of a layer and projection in one row."""
    places = contents.places
    if not places:
        return None
    groups: dict[int, list[tuple[str, ...]]] = {}
    for place in places[:_MOST_PLACES]:
        groups.setdefault(place.block, []).append(_place_row(place))
    headings = ("bits per weight", "groups of", "rank", "error, base", "with sidecar")
    note = "Experts of a layer and projection are one row: their mean."
    experts = any(len(place.matrices) > 1 for place in places)
    return make_table(
        "All matrices of the blocks",
        ("block", "matrix"),
        headings,
        list(groups.values()),
        (note if experts else "") + _left_out(len(places), _MOST_PLACES),
    )


def _place_row(place: Place) -> tuple[str, ...]:
    return (
        str(place.block),
        place.kind,
        f"{place.bits_per_weight:.4f}",
        _span(sorted({one.group_size for one in place.matrices})),
        _span(sorted({one.rank for one in place.matrices})),
        number(place.base_error, ".2e"),
        number(place.error, ".2e"),
    )


def text_tables(figures: TextFigures) -> list[Table]:
    """The tables about a text that was scored."""
    scores = figures.scores
    rows = [
        (label, plus_minus(scores[key], scores.get(f"{key}_se"), form))
        for key, label, form in _SCORES
        if scores.get(key) is not None
    ]
    overall = f"{scores['tokens']:,} tokens in {scores['chunks']} chunks of {figures.text}"
    note = f"{overall}, in {scores['dtype']}; nats per token, ± standard errors over chunks."
    return [
        make_table("Against the reference", ("figure",), ("value",), _single(rows), note),
        _groups(
            "KL by kind of token",
            "kind",
            [(KINDS[group.name], group) for group in figures.kinds],
            "Of the token that is predicted. A word begins where a space or nothing of a word"
            " stands before it.",
        ),
        _groups(
            "KL by position",
            "tokens read before",
            [(group.name, group) for group in figures.positions],
            "How many tokens of its chunk both models had read.",
        ),
    ]


def _groups(title: str, heading: str, groups: Iterable[tuple[str, TokenGroup]], note: str) -> Table:
    rows = [
        (name, f"{group.tokens:,}", plus_minus(group.kl, group.kl_se, ".5f"), percent(group.share))
        for name, group in groups
    ]
    return make_table(title, (heading,), ("tokens", "KL ± se", "of all KL"), _single(rows), note)


def _single(rows: Iterable[tuple[str, ...]]) -> list[list[tuple[str, ...]]]:
    """Rows that belong to no group."""
    return [[row] for row in rows]


def _span(values: Sequence[Any], form: str = "{0}") -> str:
    """One value, or the first and the last of several that are sorted."""
    shown = [form.format(value) for value in values]
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def _geometric(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and value > 0]
    return geometric_mean(known) if known else None


def _left_out(count: int, most: int) -> str:
    return f" {count - most} more rows are left out; --json has them." if count > most else ""
