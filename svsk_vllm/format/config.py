# SPDX-License-Identifier: Apache-2.0
"""The ``quantization_config`` of an SVSK checkpoint: schema, and which scheme a module gets.

Targets and ignore entries are matched as :mod:`svsk_vllm.format.targets` says.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from svsk_kernels.codes import Codebook, code_bits
from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.problems import problem_text, shown
from svsk_vllm.format.targets import LINEAR_CLASS, Entries, Target, printable
from svsk_vllm.version import FORMAT_VERSION, __version__

__all__ = [
    "GROUP_SIZES",
    "MAX_RANK",
    "ONE_LEVEL",
    "ConfigGroup",
    "EmbeddingArgs",
    "ScaleBits",
    "SidecarArgs",
    "Strict",
    "SvskCheckpointConfig",
    "WeightArgs",
]

ScaleBits: TypeAlias = Literal[6, 8, 16]

ONE_LEVEL: Final = 16
"""``scale_bits`` of a group that stores its scales as they are, in the model's dtype."""

GROUP_SIZES = (16, 32, 64)
MAX_RANK = 512
_MAX_RANK_OF_1_0 = 128
_SHOWN_CHARACTERS = 100


class Strict(BaseModel):
    """Unknown keys are errors; instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightArgs(Strict):
    """The base of a weight.

    ``num_bits`` 8 goes with codebook ``int8`` and no other, for embeddings and output heads.
    ``scale_bits`` 16 stores each group's scale in the model's dtype; 8 and 6 in two levels
    (:mod:`svsk_vllm.format.group_scales`). ``hot_rows`` of the rows of an embedding or output head
    have codes of 8 bits (:mod:`svsk_vllm.format.hot_rows`).
    """

    num_bits: Literal[4, 8] = 4
    type: Literal["int"] = "int"
    symmetric: Literal[True] = True
    strategy: Literal["group"] = "group"
    group_size: int = Field(default=64, strict=True)
    codebook: Codebook = "int4"
    scale_bits: ScaleBits = ONE_LEVEL
    hot_rows: int = Field(default=0, ge=0, strict=True)

    @field_validator("group_size")
    @classmethod
    def _known_group_size(cls, value: int) -> int:
        if value not in GROUP_SIZES:
            raise ValueError(f"expected one of {GROUP_SIZES}, got {value}")
        return value

    @model_validator(mode="after")
    def _bits_of_codebook(self) -> "WeightArgs":
        if self.num_bits != code_bits(self.codebook):
            raise ValueError(
                f"num_bits {self.num_bits} with codebook {self.codebook}, whose codes have"
                f" {code_bits(self.codebook)} bits"
            )
        if self.num_bits == 8 and self.scale_bits != ONE_LEVEL:
            raise ValueError(f"scale_bits {self.scale_bits} with num_bits 8: expected {ONE_LEVEL}")
        if self.hot_rows and (self.codebook, self.scale_bits) != ("int4", ONE_LEVEL):
            raise ValueError(
                f"hot_rows {self.hot_rows} with codebook {self.codebook} and scale_bits"
                f" {self.scale_bits}: expected int4 and {ONE_LEVEL}"
            )
        return self

    @property
    def codes_per_word(self) -> int:
        """How many codes an int32 of ``weight_packed`` holds."""
        return 32 // self.num_bits

    def shape_of(self, packed: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the weight whose ``weight_packed`` has a shape [rows, words]."""
        rows, words = packed
        return rows + self.hot_rows, words * self.codes_per_word

    @property
    def joined_codebook(self) -> Codebook:
        """Codebook of all codes of a weight, those of hot rows among the others.

        ``int4`` and ``int8`` have the same level for the same code.
        """
        return "int8" if self.hot_rows else self.codebook

    @property
    def version(self) -> str:
        """The first version of the format that has these values."""
        new = (
            self.scale_bits != ONE_LEVEL
            or self.group_size == 16
            or self.num_bits == 8
            or self.hot_rows > 0
        )
        return "1.1" if new else "1.0"

    @model_serializer(mode="wrap")
    def _without_new_defaults(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = default(self)
        if self.scale_bits == ONE_LEVEL:  # readers of version 1.0 do not know the keys
            values.pop("scale_bits", None)
        if not self.hot_rows:
            values.pop("hot_rows", None)
        return values


class SidecarArgs(Strict):
    """The sidecar of a weight: rank 0 means none, a tile size of 0 the whole dimension."""

    rank: int = Field(default=0, ge=0, le=MAX_RANK, strict=True)
    tile_m: int = Field(default=512, ge=0, strict=True)
    tile_n: int = Field(default=1024, ge=0, strict=True)
    num_bits: Literal[4, 8] = 8

    @property
    def version(self) -> str:
        """The first version of the format that has these values."""
        return "1.1" if self.rank > _MAX_RANK_OF_1_0 else "1.0"

    @model_validator(mode="after")
    def _even_axes(self) -> "SidecarArgs":
        if self.num_bits == 4 and self.rank % 2:
            raise ValueError(
                f"rank {self.rank} with num_bits 4: the rank"
                " must be even (two factors share a byte)"
            )
        return self


class ConfigGroup(Strict):
    """Modules that share a scheme."""

    targets: tuple[Target, ...] = Field(min_length=1)
    weights: WeightArgs = WeightArgs()
    sidecar: SidecarArgs = SidecarArgs()

    @property
    def version(self) -> str:
        """The first version of the format that has these values."""
        return max(self.weights.version, self.sidecar.version, key=_minor)

    @model_validator(mode="after")
    def _sidecar_of_four_bits(self) -> "ConfigGroup":
        if self.weights.num_bits == 8 and self.sidecar.rank:
            raise ValueError(f"sidecar of rank {self.sidecar.rank} with num_bits 8: expected 0")
        return self

    @model_validator(mode="after")
    def _hot_rows_of_one_module(self) -> "ConfigGroup":
        hot = self.weights.hot_rows
        if hot and self.sidecar.rank:
            raise ValueError(f"sidecar of rank {self.sidecar.rank} with hot_rows {hot}: expected 0")
        wide = [entry for entry in self.targets if entry == LINEAR_CLASS or entry.startswith("re:")]
        if hot and wide:
            raise ValueError(
                f"target {wide[0]} with hot_rows {hot}: expected the name of an embedding or output"
                " head"
            )
        return self


class EmbeddingArgs(Strict):
    """The module whose quantised weight is an embedding table, looked up by row.

    Attributes:
        module: its name in the checkpoint.
        tied: whether the table is the output head as well, which then is not stored.
    """

    module: Annotated[str, AfterValidator(printable)]
    tied: bool = Field(default=False, strict=True)


class SvskCheckpointConfig(Strict):
    """``quantization_config`` in config.json; ``producer`` may hold anything.

    ``activations`` is what the writer would have the base multiplied with, where an engine can:
    ``int8`` is 8 bits by token and 64 columns, the sidecar's as they are.
    """

    quant_method: Literal["svsk"] = "svsk"
    format: Literal["svsk"] = "svsk"
    version: str = FORMAT_VERSION
    config_groups: dict[Annotated[str, AfterValidator(printable)], ConfigGroup] = Field(
        min_length=1
    )
    ignore: tuple[Target, ...] = ()
    embedding: EmbeddingArgs | None = None
    activations: Literal["exact", "int8"] = "exact"
    producer: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], source: str = "quantization_config"
    ) -> "SvskCheckpointConfig":
        """Parse and check ``raw``, naming ``source`` in errors.

        Raises:
            SvskFormatError: unknown key, wrong value, or a major version this package does not
                read.
        """
        _check_version(raw.get("version"), source)
        try:
            config = cls.model_validate(dict(raw))
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(_key, item['loc'])) or 'top level'}: {problem_text(item)}"
                for item in error.errors()
            )
            raise SvskFormatError(
                f"{source}: {problems}. docs/format.md lists the keys and values."
            ) from error
        if _minor(config.needed_version) > _minor(config.version):
            raise SvskFormatError(
                f"{source}: version {config.version} with scale_bits, num_bits 8, hot_rows, a"
                f" group_size of 16, a rank over {_MAX_RANK_OF_1_0}, an embedding or activations,"
                f" which are of version {config.needed_version}. Correct the version, or copy the"
                " folder again."
            )
        return config

    @property
    def needed_version(self) -> str:
        """The first version of the format that has every value used here."""
        used = [group.version for group in self.config_groups.values()]
        new = self.embedding is not None or self.activations != "exact"
        return max([*used, "1.1"] if new else used, key=_minor)

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready dictionary that goes into config.json."""
        values = self.model_dump(mode="json")
        if self.embedding is None:  # readers of version 1.0 do not know the key
            del values["embedding"]
        if self.activations == "exact":
            del values["activations"]
        return {**values, "version": max(self.version, self.needed_version, key=_minor)}

    def is_embedding(self, name: str) -> bool:
        """Whether ``name`` is the module that is a quantised table."""
        return self.embedding is not None and self.embedding.module == name

    def rename(self, rename: Callable[[list[str]], list[str]]) -> "SvskCheckpointConfig":
        """A copy with the module names of all targets and ignore entries translated.

        Args:
            rename: maps a list of names; class names and patterns are passed through it too, as
                compressed-tensors does in vLLM.
        """
        groups = {
            key: group.model_copy(update={"targets": tuple(rename(list(group.targets)))})
            for key, group in self.config_groups.items()
        }
        changes: dict[str, Any] = {
            "config_groups": groups,
            "ignore": tuple(rename(list(self.ignore))),
        }
        if self.embedding is not None:
            renamed = next(iter(rename([self.embedding.module])), self.embedding.module)
            changes["embedding"] = self.embedding.model_copy(update={"module": renamed})
        return self.model_copy(update=changes)

    def is_ignored(self, name: str) -> bool:
        """Whether an ignore entry matches the linear module ``name`` (Hugging Face name)."""
        return bool(self._ignored.best(name))

    def scheme_for(self, name: str, *, by_class: bool = True) -> ConfigGroup | None:
        """The group that quantises a linear module, None when it is ignored or not targeted.

        Where several groups match, an exact name wins over a regular expression and that over a
        class name. A class name does not match the embedding.

        Args:
            name: Hugging Face module name, for example ``model.layers.0.self_attn.q_proj``.
            by_class: whether a class name matches. Not for an output head, which no class name
                means.

        Raises:
            SvskFormatError: two groups match equally well.
        """
        if self.is_ignored(name):
            return None
        by_class = by_class and not self.is_embedding(name)
        keys = self._targets.best(name, by_class=by_class)
        if not keys:
            return None
        if len(keys) > 1:
            raise SvskFormatError(
                f"{name}: config groups {', '.join(keys)} match"
                " equally well. Make one target more specific."
            )
        return self.config_groups[keys[0]]

    # By name, for a mixture of experts names tens of thousands.
    @cached_property
    def _targets(self) -> Entries:
        groups = self.config_groups
        return Entries((target, key) for key in groups for target in groups[key].targets)

    @cached_property
    def _ignored(self) -> Entries:
        return Entries((entry, entry) for entry in self.ignore)

    def model_copy(
        self, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> "SvskCheckpointConfig":
        copied = super().model_copy(update=update, deep=deep)
        for name in ("_targets", "_ignored"):  # those of the original's
            copied.__dict__.pop(name, None)
        return copied


def _key(part: Any) -> str:
    text = str(part)
    return text if text.isprintable() and len(text) <= _SHOWN_CHARACTERS else shown(text)


def _minor(version: str) -> int:
    return int(version.split(".")[1])


def _check_version(version: Any, source: str) -> None:
    if (
        not isinstance(version, str)
        or not all(part.isdigit() for part in version.split("."))
        or version.count(".") != 1
    ):
        raise SvskFormatError(
            f'{source}: version {version!r}: expected a string "major.minor" such as'
            f' "{FORMAT_VERSION}".'
        )
    if version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        raise SvskFormatError(
            f"{source}: format version {version} is not readable by svsk-vllm"
            f" {__version__}, which reads version {FORMAT_VERSION.split('.')[0]}.x."
            " Install the release of svsk-vllm that wrote the checkpoint"
            " (producer.svsk in config.json names it), or quantise the model again."
        )
