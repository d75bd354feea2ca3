# SPDX-License-Identifier: Apache-2.0
"""Drawing calibration samples from all over a source, without reading it all."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch

from svsk_kernels.errors import SvskError
from svsk_offline.calibration.sources import Source
from svsk_offline.calibration.text import CalibrationSet, bos_prefix, cut_pieces, token_fingerprint

__all__ = ["load_calibration"]

_WHOLE: Final = 1 << 17
"""Bytes up to which a file is always tokenised as a whole."""

_GOLDEN: Final = 0.6180339887
"""Its multiples, whole parts taken off, keep the largest distances from each other."""

_PLENTY: Final = 8
"""Tokens that are read of a source of any length, per token that is drawn."""

_CHARACTERS: Final = 4
"""Characters of a token, by and large; English and code have 3 to 5."""

_REACH: Final = 8
"""Characters read per token of a sample at first; more where that is not enough."""

_MARGIN: Final = 8
"""Tokens behind a sample, because the end of what was read may cut a word."""

Encode = Callable[[str], list[int]]


def load_calibration(
    source: str,
    tokenizer: Any,
    samples: int,
    seq_len: int,
    seed: int,
    *,
    chat_template: bool = False,
) -> CalibrationSet:
    """Tokenise calibration text and draw samples from all over it.

    A small source (128 KiB, or 32 characters per token that is drawn) is tokenised as one stream
    and cut into pieces of ``seq_len``; of each of ``samples`` equal parts of the stream one piece
    is drawn with the seed. A larger file is never tokenised as a whole: in each of ``samples``
    equal parts of it a place is drawn with the seed, and the sample is what follows there from the
    next line (or row, or word) on. Time and memory are then those of the samples, except that a
    JSON list, a compressed file and a parquet file are gone through twice, one row in memory at a
    time. Of a data set on the hub as much is read as makes eight times the tokens drawn, from its
    beginning.

    Where the tokenizer puts a beginning-of-sequence token in front of a text (:func:`bos_prefix`),
    every piece starts with it and holds that many tokens of the stream less. A chat template may
    render that token itself (``<s>`` at the beginning of a conversation). It stays in the stream,
    where it marks the conversation's beginning as it does when the model is served. Pieces are cut
    regardless of conversations, so only a piece that happens to start with a conversation, like the
    first one, has it twice.

    Args:
        source: ``python`` (standard library), a file, or the name of a ``datasets`` dataset, as
            ``name``, ``name:split`` or ``name:config:split``. What a file is, its content says:
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

    Raises:
        SvskError: no such source, bytes of another encoding, a row that holds none of these or
            null, messages that the chat template rejects or that none is there for, too little
            text, or samples too short for a token of text.
    """
    prefix = bos_prefix(tokenizer)
    cut_pieces([], prefix, seq_len)  # refuses samples that hold no text
    width = seq_len - len(prefix)
    text_source = Source(source, tokenizer, chat_template)
    limit = max(_WHOLE, _PLENTY * _CHARACTERS * samples * width)
    generator = torch.Generator().manual_seed(seed)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    if text_source.size is not None and text_source.size > limit:
        text = _at_places(text_source, text_source.size, encode, samples, width, generator)
    elif (
        text_source.file is not None
        and text_source.size is None
        and (total := sum(map(len, text_source.documents()))) > limit
    ):
        text = _on_the_way(text_source, total, encode, samples, width, generator)
    else:
        text = _of_the_whole(text_source, encode, samples, width, generator, bool(prefix))
    text_source.check_chat()
    tokens = torch.cat(
        [torch.tensor(prefix, dtype=torch.int64).expand(samples, len(prefix)), text], dim=1
    )
    name = text_source.file.path.name if text_source.file else source
    return CalibrationSet(tokens, name, token_fingerprint(tokens), bos=bool(prefix))


def _of_the_whole(
    source: Source, encode: Encode, samples: int, width: int, generator: torch.Generator, bos: bool
) -> torch.Tensor:
    """Pieces [samples, width] of the stream of all documents, or of as many as are plenty."""
    documents: Iterable[str] = source.documents()
    if source.file is not None and source.file.kind == "text":
        documents = ["".join(documents)]
    ids: list[int] = []
    for text in documents:
        ids += encode(text)
        if len(ids) >= _PLENTY * samples * width:
            break
    stream = cut_pieces(ids, (), width)
    pieces = len(stream)
    if pieces < samples:
        raise SvskError(
            f"Calibration text {source.name} has {len(ids)} tokens, {pieces} pieces of"
            f" {width}{' after BOS' if bos else ''}; {samples} samples are asked for. Give more"
            " text, or lower --samples or --seq-len."
        )
    edges = torch.linspace(0, pieces, samples + 1).long()
    draw = torch.rand(samples, generator=generator)
    return stream[edges[:-1] + (draw * (edges[1:] - edges[:-1])).long()].contiguous()


def _places(total: int, samples: int, width: int, generator: torch.Generator) -> list[int]:
    """A place in each of equal parts of a source, far enough from its end for most samples."""
    part = total / samples
    room = max(0.0, part - _REACH * (width + _MARGIN))
    draw = torch.rand(samples, generator=generator, dtype=torch.float64)
    return [int(index * part + float(share) * room) for index, share in enumerate(draw)]


def _at_places(
    source: Source, size: int, encode: Encode, samples: int, width: int, generator: torch.Generator
) -> torch.Tensor:
    """Samples [samples, width] from places of a file, of which nothing else is read."""
    assert source.file is not None, "only files have places"
    rows = source.file.kind != "text"

    def read(place: int, number: int) -> Iterator[str]:
        # Places in one long row all lead to the next one: multiples of the golden ratio spread them
        # over it.
        share = number * _GOLDEN % 1
        return _from_within(source.after(place), share, width) if rows else source.after(place)

    drawn: list[list[int]] = []
    for number, start in enumerate(_places(size, samples, width, generator)):
        place, step = start, size // samples
        while len(ids := _window(read(place, number), encode, width)) < width:
            if place == 0:
                raise _too_little(source, width)
            place, step = max(0, place - step), 2 * step  # too near the end of the file
        drawn.append(ids)
    return torch.tensor(drawn, dtype=torch.int64)


def _on_the_way(
    source: Source, total: int, encode: Encode, samples: int, width: int, generator: torch.Generator
) -> torch.Tensor:
    """Samples [samples, width] of a source that can only be gone through from its beginning."""
    drawn = []
    # `ahead` is the text from `place` on that was read.
    documents, ahead, place = (
        source.documents(),
        "",
        0,
    )
    for start in _places(total, samples, width, generator):
        while place + len(ahead) <= start and (document := next(documents, None)) is not None:
            place, ahead = place + len(ahead), document
        if start > place:
            skipped = (
                start - place + _next_word(ahead[start - place : start - place + _REACH * width])
            )
            place, ahead = place + skipped, ahead[skipped:]
        read = [ahead]

        def following(read: list[str] = read) -> Iterator[str]:
            yield read[0]
            for document in documents:
                read.append(document)
                yield document

        ids = _window(following(), encode, width)
        if len(ids) < width:
            raise _too_little(source, width)
        drawn.append(ids)
        ahead = "".join(read)
    return torch.tensor(drawn, dtype=torch.int64)


def _window(pieces: Iterator[str], encode: Encode, width: int) -> list[int]:
    """The first ``width`` tokens of a text, or all; reads little more than they take."""
    read: list[str] = []
    length, enough = 0, _REACH * (width + _MARGIN)
    for piece in pieces:
        read.append(piece)
        length += len(piece)
        while length >= enough:
            ids = encode("".join(read)[:enough])
            if len(ids) >= width + _MARGIN:
                return ids[:width]
            enough *= 2
    return encode("".join(read))[:width]


def _from_within(pieces: Iterator[str], share: float, width: int) -> Iterator[str]:
    """A text, begun somewhere within its first piece where that is as long as a book."""
    first = next(pieces, "")
    room = len(first) - 2 * _REACH * (width + _MARGIN)
    start = int(share * room) if room > 0 else 0
    yield first[start + _next_word(first[start : start + _REACH * width]) :] if start else first
    yield from pieces


def _next_word(text: str) -> int:
    """Where the first whole line begins, or else the first whole word, or else 0."""
    place = text.find("\n") + 1
    return place or next((i + 1 for i, letter in enumerate(text) if letter.isspace()), 0)


def _too_little(source: Source, width: int) -> SvskError:
    return SvskError(
        f"Calibration text {source.name}: a part of it holds fewer than {width} tokens (is it blank"
        " there?). Give other text, or lower --samples or --seq-len."
    )
