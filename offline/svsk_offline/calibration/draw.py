# SPDX-License-Identifier: Apache-2.0
"""Drawing calibration samples from all over a source, without reading it all."""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

import torch

from svsk_kernels.errors import SvskError
from svsk_offline.calibration.sources import Source
from svsk_offline.calibration.text import bos_prefix, cut_pieces, pack_rows, without_prefix

__all__ = ["SampleDraw"]

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


class SampleDraw:
    """A draw of samples from one source.

    A small source (128 KiB, or 32 characters per token that is drawn) is tokenised as a whole and
    cut into pieces; of each of equal parts of the pieces one is drawn with the seed. A larger file
    is never tokenised as a whole: in each of equal parts of it a place is drawn with the seed, and
    the sample is what follows there from the next line (or row, or word) on. Time and memory are
    then those of the samples, except that a JSON list, a compressed file and a parquet file are
    gone through twice, one row in memory at a time. Of a data set on the hub as much is read as
    makes eight times the tokens drawn, from its beginning. Built-in texts order themselves by the
    seed, and are taken from their beginning.

    Where a source has rows, samples begin where a row begins (:func:`pack_rows`), unless there are
    too few rows for that, or a row is as long as a book.

    Args:
        source: where the text comes from.
        tokenizer: the model's.
        samples: number of samples.
        seq_len: tokens per sample, with what :func:`bos_prefix` finds.
        seed: of the draw.
        fewer: take as many samples as there are where the text is too short.

    Raises:
        SvskError: ``seq_len`` leaves no room for text.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        samples: int,
        seq_len: int,
        seed: int,
        *,
        fewer: bool = False,
    ) -> None:
        self.source, self.tokenizer, self.samples, self.fewer = source, tokenizer, samples, fewer
        self.prefix = bos_prefix(tokenizer)
        cut_pieces([], self.prefix, seq_len)  # refuses samples that hold no text
        self.width = seq_len - len(self.prefix)
        self.generator = torch.Generator().manual_seed(seed)

    def tokens(self) -> torch.Tensor:
        """Samples [samples, seq_len], int64, each behind the prefix; fewer where that is allowed.

        Raises:
            SvskError: too little text, or a row or a byte that is none.
        """
        file, size = self.source.file, self.source.size
        limit = max(_WHOLE, _PLENTY * _CHARACTERS * self.samples * self.width)
        if size is not None and size > limit:
            text = self._at_places(size)
        elif (
            file is not None
            and size is None
            and (total := sum(map(len, self.source.documents()))) > limit
        ):
            text = self._on_the_way(total)
        else:
            text = self._of_the_whole()
        front = torch.tensor(self.prefix, dtype=torch.int64).expand(len(text), len(self.prefix))
        return torch.cat([front, text], dim=1)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _of_the_whole(self) -> torch.Tensor:
        """Pieces [samples, width] of all documents, or of as many as are plenty."""
        source, width = self.source, self.width
        most = self.samples if source.ordered else _PLENTY * self.samples
        read: list[list[int]] = []

        def encoded() -> Iterator[list[int]]:
            for text in source.documents() if source.has_rows else self._stream():
                read.append(self._encode(text))
                yield read[-1]

        rows = encoded()
        packed = list(islice(pack_rows(rows, self.prefix, width), most)) if source.has_rows else []
        if len(packed) >= self.samples:
            pieces = torch.tensor(packed, dtype=torch.int64)
        else:
            # No rows, or too few to begin every sample with one: one stream, cut regardless.
            count = sum(map(len, read))
            for ids in rows:
                count += len(ids)
                if count >= _PLENTY * self.samples * width:
                    break
            pieces = cut_pieces([token for ids in read for token in ids], (), width)
        samples = min(self.samples, len(pieces)) if self.fewer else self.samples
        if not 0 < samples <= len(pieces):
            raise SvskError(
                f"Calibration text {source.name} has {sum(map(len, read))} tokens, {len(pieces)}"
                f" pieces of {width}{' after BOS' if self.prefix else ''}; {self.samples} samples"
                " are asked for. Give more text, or lower --samples or --seq-len."
            )
        edges = torch.linspace(0, len(pieces), samples + 1).long()
        draw = torch.rand(samples, generator=self.generator)
        return pieces[edges[:-1] + (draw * (edges[1:] - edges[:-1])).long()].contiguous()

    def _stream(self) -> Iterator[str]:
        """Documents of a source without rows; the blocks of a file are one text."""
        documents = self.source.documents()
        return iter(["".join(documents)]) if self.source.file is not None else documents

    def _places(self, total: int) -> list[int]:
        """A place in each of equal parts of a source, far enough from its end for most samples."""
        part = total / self.samples
        room = max(0.0, part - _REACH * (self.width + _MARGIN))
        draw = torch.rand(self.samples, generator=self.generator, dtype=torch.float64)
        return [int(index * part + float(share) * room) for index, share in enumerate(draw)]

    def _at_places(self, size: int) -> torch.Tensor:
        """Samples [samples, width] from places of a file, of which nothing else is read."""
        source, width = self.source, self.width

        def read(place: int, number: int) -> Iterator[str]:
            # Places in one long row all lead to the next one: multiples of the golden ratio spread
            # them over it.
            share = number * _GOLDEN % 1
            text = source.after(place)
            return self._from_within(text, share) if source.has_rows else text

        drawn: list[list[int]] = []
        for number, start in enumerate(self._places(size)):
            place, step = start, size // self.samples
            while len(ids := self._window(read(place, number))) < width:
                if place == 0:
                    raise self._too_little()
                place, step = max(0, place - step), 2 * step  # too near the end of the file
            drawn.append(ids)
        return torch.tensor(drawn, dtype=torch.int64)

    def _on_the_way(self, total: int) -> torch.Tensor:
        """Samples [samples, width] of a source that can only be gone through from its beginning."""
        drawn: list[list[int]] = []
        documents = self.source.documents()
        ahead: deque[str] = deque()  # what was read from `place` on
        place = 0

        def following(first: str, skipped: int) -> Iterator[str]:
            yield first
            yield from islice(list(ahead), skipped, None)
            for document in documents:
                ahead.append(document)
                yield document

        for start in self._places(total):
            while True:
                if not ahead and (document := next(documents, None)) is not None:
                    ahead.append(document)
                if not ahead or place + len(ahead[0]) > start:
                    break
                place += len(ahead.popleft())
            first = ahead[0] if ahead else ""
            within = max(0, start - place)
            ids: list[int] = []
            if self.source.has_rows and within and len(first) <= self._book:
                ids = self._window(following("", 1))  # from the next row on
            if len(ids) < self.width:
                if within:
                    within += _next_word(first[within : within + _REACH * self.width])
                ids = self._window(following(first[within:], 1))
            if len(ids) < self.width:
                raise self._too_little()
            drawn.append(ids)
        return torch.tensor(drawn, dtype=torch.int64)

    @property
    def _book(self) -> int:
        """Characters of a row within which a sample may begin, as it is so long."""
        return 2 * _REACH * (self.width + _MARGIN)

    def _window(self, pieces: Iterator[str]) -> list[int]:
        """The first ``width`` tokens of a text, or all; reads little more than they take."""
        read: list[str] = []
        prefix = self.prefix if self.source.has_rows else []
        width = self.width + len(prefix)
        length, enough = 0, _REACH * (width + _MARGIN)
        for piece in pieces:
            read.append(piece)
            length += len(piece)
            while length >= enough:
                ids = self._encode("".join(read)[:enough])
                if len(ids) >= width + _MARGIN:
                    return without_prefix(ids, prefix)[: self.width]
                enough *= 2
        return without_prefix(self._encode("".join(read)), prefix)[: self.width]

    def _from_within(self, pieces: Iterator[str], share: float) -> Iterator[str]:
        """A text, begun somewhere within its first piece where that is as long as a book."""
        first = next(pieces, "")
        room = len(first) - self._book
        start = int(share * room) if room > 0 else 0
        yield (
            first[start + _next_word(first[start : start + _REACH * self.width]) :]
            if start
            else first
        )
        yield from pieces

    def _too_little(self) -> SvskError:
        return SvskError(
            f"Calibration text {self.source.name}: a part of it holds fewer than {self.width}"
            " tokens (is it blank there?). Give other text, or lower --samples or --seq-len."
        )


def _next_word(text: str) -> int:
    """Where the first whole line begins, or else the first whole word, or else 0."""
    place = text.find("\n") + 1
    return place or next((i + 1 for i, letter in enumerate(text) if letter.isspace()), 0)
