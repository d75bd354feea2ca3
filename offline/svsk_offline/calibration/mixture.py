# SPDX-License-Identifier: Apache-2.0
"""Calibration text of one source or several, each with its share of the samples."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from svsk_kernels.errors import SvskError
from svsk_offline.calibration.draw import SampleDraw
from svsk_offline.calibration.sources import Source, check_chat, check_sources
from svsk_offline.calibration.text import (
    CalibrationPart,
    CalibrationSet,
    bos_prefix,
    token_fingerprint,
)
from svsk_offline.calibration_entries import (
    DEFAULT_PARTS,
    DEFAULT_SOURCE,
    CalibrationEntry,
    calibration_entries,
    sample_counts,
)

__all__ = ["load_calibration"]


def load_calibration(
    sources: str | Sequence[str],
    tokenizer: Any,
    samples: int,
    seq_len: int,
    seed: int,
    *,
    chat_template: bool = False,
    fewer: bool = False,
) -> CalibrationSet:
    """Tokenise calibration text and draw samples from all over it (:class:`SampleDraw`).

    Where the tokenizer puts a beginning-of-sequence token in front of a text (:func:`bos_prefix`),
    every sample starts with it and holds that many tokens of text less. A chat template may render
    that token itself (``<s>`` at the beginning of a conversation). Within a sample it stays, where
    it marks the next conversation's beginning.

    Args:
        sources: entries of ``--calibration`` (:func:`calibration_entries`): a built-in text, a
            file, or the name of a ``datasets`` dataset, as ``name``, ``name:split`` or
            ``name:config:split``; each perhaps with a colon and its weight. Samples are divided by
            the weights, and every source gets one at least. What a file is, its content says:
            plain text, a JSON object per line, a list of objects, each perhaps compressed by gzip,
            or parquet; in UTF-8, or UTF-16 with a byte order mark. Rows may hold ``text``,
            ``messages`` or ShareGPT's ``conversations`` (rendered with the chat template),
            ``question`` and ``answer``, ``prompt`` and ``completion``, or Alpaca's ``instruction``,
            ``input`` and ``output``.
        tokenizer: the model's tokenizer.
        samples: number of samples.
        seq_len: tokens per sample, with the beginning-of-sequence token.
        seed: of the draw.
        chat_template: render question and answer, and the like, as a user's and an assistant's
            message.
        fewer: take as many samples as there are from a source that is too short.

    Raises:
        SvskError: no such source, bytes of another encoding, a row that holds none of these or
            null, messages that the chat template rejects or that none is there for, too little
            text, fewer samples than sources, or samples too short for a token of text.
    """
    entries = calibration_entries(sources)
    check_sources(entries, chat_template)
    if samples < len(entries):
        raise SvskError(
            f"--calibration names {len(entries)} texts, but {samples} samples are asked for:"
            f" expected {len(entries)} or more, one of each. Raise --samples, or name fewer texts."
        )
    used: list[Source] = []
    tokens: list[torch.Tensor] = []
    parts: list[CalibrationPart] = []
    for number, (entry, count) in enumerate(_leaves(entries, samples)):
        # Each with another seed, as built-in texts order themselves by it.
        source = Source(entry.name, tokenizer, chat_template, seed + number)
        draw = SampleDraw(source, tokenizer, count, seq_len, seed + number, fewer=fewer)
        used.append(source)
        tokens.append(draw.tokens())
        parts.append(
            CalibrationPart(
                source.label,
                round(entry.share, 6),
                len(tokens[-1]),
                token_fingerprint(tokens[-1]),
            )
        )
    if chat_template:
        check_chat(used)
    drawn, bos = torch.cat(tokens), bool(bos_prefix(tokenizer))
    single = len(entries) == 1
    name = entries[0].name if single and len(parts) > 1 else _listed(parts)
    return CalibrationSet(
        drawn, name, token_fingerprint(drawn), bos, tuple(parts) if len(parts) > 1 else ()
    )


def _leaves(
    entries: Sequence[CalibrationEntry], samples: int
) -> Iterator[tuple[CalibrationEntry, int]]:
    """Sources and their samples; the default mixture's parts in place of it, if they get any."""
    counts = sample_counts([entry.share for entry in entries], samples, least=1)
    for entry, count in zip(entries, counts, strict=True):
        if entry.name != DEFAULT_SOURCE:
            yield entry, count
            continue
        shares = sample_counts(list(DEFAULT_PARTS.values()), count)
        for (name, share), part in zip(DEFAULT_PARTS.items(), shares, strict=True):
            if part:
                yield CalibrationEntry(name, share * entry.share), part


def _listed(parts: Sequence[CalibrationPart]) -> str:
    if len(parts) == 1:
        return parts[0].source
    return ", ".join(f"{part.source}:{part.weight:g}" for part in parts)
