# SPDX-License-Identifier: Apache-2.0
"""Which tensors a Hugging Face folder's safetensors hold, sharded or not, read without torch."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final

from safetensors import SafetensorError

from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.files import MAX_INDEX_BYTES, Framework, read_json, safe_handle

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "ShardHeaders",
    "read_weight_map",
    "require_printable",
]

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"


def read_weight_map(index: Path) -> dict[str, str]:
    """Shard file name by tensor name, from a ``model.safetensors.index.json``.

    Raises:
        SvskFormatError: the file is damaged, or a shard is not a file beside the index.
    """
    weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise SvskFormatError(f'{index}: no "weight_map" object. Copy or write the file again.')
    require_printable(index, weight_map)
    for name, shard in weight_map.items():
        # A path would let a downloaded index reach files outside its folder.
        if (
            not isinstance(shard, str)
            or not shard.endswith(".safetensors")
            or not shard.isprintable()
            or Path(shard).name != shard
        ):
            raise SvskFormatError(
                f"{index}: {name} is in {shard!r}, expected"
                " the name of a .safetensors file beside it."
            )
    return weight_map


def require_printable(path: Path, names: Iterable[str]) -> None:
    """Refuse tensor names that a terminal would obey or that cannot be written.

    Raises:
        SvskFormatError: a name holds a control character or half a surrogate pair.
    """
    for name in names:
        if not name.isprintable():
            raise SvskFormatError(
                f"{path}: tensor {name!r}: expected a name of printable characters. Copy or"
                " download the file again."
            )


class ShardHeaders:
    """Names, dtypes and shapes of the tensors of a model folder.

    Args:
        folder: holds ``model.safetensors``, or shards and ``model.safetensors.index.json``. Of
            both, the single file counts, as it does for transformers.
        by_headers: let the index only name the files, as transformers does, and open all of them at
            once to see which tensors they hold; of two with one name the later file's counts.
        shards: names of the files to read, whatever an index says; opened like that too.

    Raises:
        SvskFormatError: neither is there, the index is damaged, or a shard cannot be opened.
    """

    _framework: ClassVar[Framework] = "numpy"

    def __init__(
        self, folder: Path, *, by_headers: bool = False, shards: Iterable[str] | None = None
    ) -> None:
        self.folder = folder
        self._handles: dict[str, Any] = {}
        index = folder / INDEX_NAME
        if shards is not None:
            self._shard_of = self._held(shards)
        elif (folder / SINGLE_NAME).exists():
            self._shard_of = self._held([SINGLE_NAME])
        elif index.exists():
            self._shard_of = read_weight_map(index)
            if by_headers:
                self._shard_of = self._held(self.shards)
        else:
            raise SvskFormatError(
                f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME}. Only safetensors are read:"
                " convert other weights with save_pretrained() of transformers."
            )

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the order of the index."""
        return list(self._shard_of)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def shard_of(self, name: str) -> str:
        """File name of the shard that holds ``name``."""
        try:
            return self._shard_of[name]
        except KeyError:
            raise SvskFormatError(f"{self.folder}: no tensor {name}.") from None

    @property
    def shards(self) -> list[str]:
        """File names of the shards that hold a tensor, sorted."""
        return sorted(set(self._shard_of.values()))

    def metadata(self, shard: str) -> dict[str, str]:
        """The ``__metadata__`` of a shard's header."""
        metadata: dict[str, str] | None = self._open(shard).metadata()
        return metadata or {}

    def stored(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype, as safetensors calls it, and shape of a tensor, without reading its data.

        Raises:
            SvskFormatError: there is none.
        """
        with self._errors(name):
            view = self._open(self.shard_of(name)).get_slice(name)
            return view.get_dtype(), tuple(view.get_shape())

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        shard = self.shard_of(name)
        try:
            yield
        except SvskFormatError:
            raise
        # The first where the file lacks the tensor, the others where torch has no such dtype or no
        # such shape.
        except (
            SafetensorError,
            AttributeError,
            OverflowError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise SvskFormatError(f"{self.folder / shard}: cannot read {name}: {error}.") from error

    def _held(self, shards: Iterable[str]) -> dict[str, str]:
        """Shard by tensor name, from the headers of the shards."""
        shard_of: dict[str, str] = {}
        for shard in shards:
            names = list(self._open(shard).keys())
            require_printable(self.folder / shard, names)
            shard_of |= dict.fromkeys(names, shard)
        return shard_of

    def _open(self, shard: str) -> Any:
        if shard not in self._handles:
            self._handles[shard] = safe_handle(self.folder / shard, self._framework)
        return self._handles[shard]
