# SPDX-License-Identifier: Apache-2.0
"""Which of a model's embedding table and output head are quantised, and under which names."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from svsk_kernels.errors import SvskError
from svsk_offline.planning.serving import vllm_class_of
from svsk_offline.recipe import AlternatingRecipe, Recipe
from svsk_offline.storage.dense_model import ModelSource
from svsk_vllm.format import (
    ConfigGroup,
    EmbeddingArgs,
    LinearSpec,
    SidecarArgs,
    WeightArgs,
)
from svsk_vllm.format.targets import matches

__all__ = ["Table", "TablePlan", "after_head", "plan_tables"]

_GROUP_SIZES: Final = (64, 32, 16)


@dataclass(frozen=True)
class Table:
    """A matrix outside the decoder blocks that is quantised.

    Attributes:
        spec: with the name it has in the checkpoint.
        stored: the dense tensor in the folder.
        is_embedding: whether it is looked up by row.
        special: rows of special tokens, where some rows are hot: they come first.
    """

    spec: LinearSpec
    stored: str
    is_embedding: bool
    special: frozenset[int] = frozenset()


@dataclass(frozen=True)
class TablePlan:
    """What becomes of embedding and head.

    Attributes:
        tables: those that are quantised.
        tied: whether the quantised embedding is the head as well.
        untied: whether the model's one table becomes two in the checkpoint.
    """

    tables: tuple[Table, ...] = ()
    tied: bool = False
    untied: bool = False

    @property
    def groups(self) -> dict[str, ConfigGroup]:
        """Config groups of the tables."""
        return {"embedding" if t.is_embedding else "head": t.spec.scheme for t in self.tables}

    @property
    def embedding(self) -> EmbeddingArgs | None:
        """What config.json says of the table."""
        names = [table.spec.name for table in self.tables if table.is_embedding]
        return EmbeddingArgs(module=names[0], tied=self.tied) if names else None

    def left(self, ignore: Iterable[str]) -> list[str]:
        """Ignore entries without those that name a table.

        Raises:
            SvskError: a pattern matches one.
        """
        names = {table.spec.name for table in self.tables}
        kept = [entry for entry in ignore if entry not in names]
        for name in names:
            if hit := next((entry for entry in kept if matches(name, (entry,))), None):
                raise SvskError(
                    f"--ignore {hit}: matches {name}, which --head and --embedding decide on. Say"
                    " --head dense --embedding dense, or narrow the pattern."
                )
        return kept

    @property
    def multiplied(self) -> Table | None:
        """The quantised matrix that logits are computed with."""
        return next((t for t in self.tables if not t.is_embedding or self.tied), None)


def plan_tables(
    source: ModelSource,
    recipe: Recipe,
    scale_dtype: torch.dtype,
    message: Callable[[str], None] = lambda text: None,
) -> TablePlan:
    """Decide on embedding and head.

    Args:
        source: the dense model.
        recipe: says how each is stored.
        scale_dtype: stored dtype of scales.
        message: told which stays dense because it cannot be quantised, and of a table that is
            stored twice.

    Raises:
        SvskError: what the recipe asks for in so many words cannot be, or embedding and head are
            one matrix and cannot be stored apart in that way.
        SvskFormatError: a matrix does not fit its scheme.
    """
    args = recipe.tables
    model: Any = source.model
    lookup, output = model.get_input_embeddings(), model.get_output_embeddings()
    head_name = _weight(source, output) if isinstance(output, nn.Linear) else None
    table_name = _weight(source, lookup) if isinstance(lookup, nn.Embedding) else None
    names = source.map.sources
    if head_name and table_name and names[head_name] == names[table_name]:
        return _plan_tied(source, recipe, scale_dtype, table_name, head_name, message)
    tables = []
    for option, parameter, asked in (
        ("embedding", table_name, args.embedding),
        ("head", head_name, args.head),
    ):
        kind = _kind(source, recipe, option, asked, (parameter,), message)
        if parameter is not None and kind != "dense":
            stored = names[parameter]
            is_embedding = option == "embedding"
            tables.append(
                _table(source, stored, stored, kind, recipe, scale_dtype, is_embedding=is_embedding)
            )
    return TablePlan(tuple(tables))


def after_head(
    source: ModelSource,
    recipe: Recipe,
    plan: TablePlan,
    linears: Iterable[str],
    message: Callable[[str], None],
) -> Recipe:
    """A recipe whose bit budget is what the output head leaves, where the head counts in it.

    Args:
        source: the dense model.
        recipe: with a budget for the blocks' linears, or for them and the head.
        plan: says how the head is stored.
        linears: names of those that are quantised.
        message: told what the head leaves.

    Raises:
        SvskError: the head is dense.
    """
    allocation = recipe.allocation if isinstance(recipe, AlternatingRecipe) else None
    if allocation is None or not allocation.includes:
        return recipe
    head = plan.multiplied
    if head is None:
        raise SvskError(
            "--budget-includes head: the head stays dense, 16 bits per weight. Quantise it"
            " (--head), or leave it out of the budget."
        )
    shapes = (source.tensors.describe(f"{name}.weight").shape for name in linears)
    weights = sum(math.prod(shape) for shape in shapes)
    bits = allocation.target_bpw * (weights + head.spec.num_weights) - head.spec.stored_bits
    message(f"The head leaves {bits / weights:.4f} bits per weight to the blocks' linears")
    left = allocation.model_copy(update={"target_bpw": bits / weights})
    return recipe.model_copy(update={"allocation": left})


def _plan_tied(
    source: ModelSource,
    recipe: Recipe,
    scale_dtype: torch.dtype,
    table_name: str,
    head_name: str,
    message: Callable[[str], None],
) -> TablePlan:
    """One table for both uses, or one in 8 bits, all or some, beside a 4-bit head."""
    stored = source.map.sources[table_name]
    name = source.map.output_name(stored)
    asked = recipe.tables.embedding
    option = "head"
    head: str = recipe.tables.head
    if head == "auto" and asked != "auto":
        option, head = "embedding", asked
    head = _kind(source, recipe, option, head, (table_name, head_name), message)
    if asked in ("auto", head):
        if head == "dense":
            return TablePlan()
        table = _table(source, stored, name, head, recipe, scale_dtype, is_embedding=True)
        return TablePlan((table,), tied=True)
    if head != "svsk" or asked == "dense":
        raise SvskError(
            f"--head {head} --embedding {asked}: embedding and head of {source.folder} are one"
            f" matrix. Leave --embedding out, or say --embedding {head}."
        )
    own = source.map.name_for(head_name)
    if own is None:
        raise SvskError(
            f"{source.folder}: the head is tied to {name} and has no name of its own, so it cannot"
            " be stored apart. Leave --embedding out."
        )
    table = _table(source, stored, name, asked, recipe, scale_dtype, is_embedding=True)
    second = _table(source, stored, own, head, recipe, scale_dtype, is_embedding=False)
    message(
        f"Embedding and head are one matrix in the model and two in the checkpoint:"
        f" {table.spec.bits_per_weight:.2f} and {second.spec.bits_per_weight:.2f} bits per weight"
    )
    return TablePlan((table, second), untied=True)


def _kind(
    source: ModelSource,
    recipe: Recipe,
    option: str,
    asked: str,
    parameters: tuple[str | None, ...],
    message: Callable[[str], None],
) -> str:
    """How a table is stored; ``auto`` is ``int8``, or ``dense`` and a message where that fails.

    Args:
        source: the dense model.
        recipe: with what is ignored.
        option: ``head`` or ``embedding``.
        asked: what the recipe says of it.
        parameters: its names in the model, None where it is no stored matrix.
        message: told why it stays dense.

    Raises:
        SvskError: it cannot be stored as was asked for.
    """
    if asked == "dense":
        return asked
    obstacle = _obstacle(source, parameters)
    if asked != "auto":
        if obstacle:
            raise SvskError(
                f"--{option} {asked}: cannot be stored so: {obstacle}. Say --{option} dense."
            )
        return asked
    obstacle = obstacle or _ignored(source, recipe, parameters)
    if obstacle:
        what = {"head": "output head", "embedding": "embedding"}[option]
        message(f"The {what} stays dense: {obstacle}.")
        return "dense"
    return "int8"


def _obstacle(source: ModelSource, parameters: tuple[str | None, ...]) -> str | None:
    """Why a matrix outside the blocks cannot be quantised; None if it can."""
    parameter = parameters[0]
    if parameter is None:
        return f"{type(source.model).__name__} has none that is one stored matrix"
    architecture = vllm_class_of(source)
    if architecture.dense_tables:
        return f"vLLM {architecture.vllm} reads its dense weight in {architecture.name}"
    stored = source.map.sources[parameter]
    k = source.tensors.describe(stored).shape[1]
    if k % _GROUP_SIZES[-1]:
        return f"{stored} has {k} columns, which are not a multiple of {_GROUP_SIZES[-1]}"
    if not bool(source.tensors.read(stored).isfinite().all()):
        return f"{stored} holds values that are not finite"
    return None


def _ignored(source: ModelSource, recipe: Recipe, parameters: tuple[str | None, ...]) -> str | None:
    """Which entry of ``ignore`` is a table's; None for none."""
    names = {
        name.removesuffix(".weight")
        for parameter in filter(None, parameters)
        for name in (parameter, source.map.sources[parameter], source.map.name_for(parameter))
        if name
    }
    hit = next((e for e in recipe.ignore if any(matches(name, (e,)) for name in names)), None)
    return hit and f"{hit} is on the ignore list"


def _weight(source: ModelSource, module: nn.Module) -> str | None:
    """Parameter name of a module's weight, where it is one stored tensor."""
    for name, candidate in source.model.named_modules():
        if candidate is module and f"{name}.weight" in source.map.sources:
            return f"{name}.weight"
    return None


def _table(
    source: ModelSource,
    stored: str,
    name: str,
    kind: str,
    recipe: Recipe,
    scale_dtype: torch.dtype,
    *,
    is_embedding: bool,
) -> Table:
    n, k = source.tensors.describe(stored).shape
    module = name.removesuffix(".weight")
    group_size = next((size for size in _GROUP_SIZES if k % size == 0), _GROUP_SIZES[-1])
    side, special = SidecarArgs(), frozenset[int]()
    if kind == "int8":
        weights = WeightArgs(num_bits=8, codebook="int8", group_size=group_size)
    elif kind == "mixed-int8":
        hot = recipe.tables.hot_rows
        if hot >= n:
            raise SvskError(
                f"{stored}: has {n} rows, of which mixed-int8 is to store {hot} in 8 bits"
                f" (tables.hot_rows). Say fewer (--hot-rows {n // 8}), or int8, which has 8 bits in"
                " all."
            )
        weights = WeightArgs(group_size=group_size, hot_rows=hot)
        special = frozenset(token for token in source.special_tokens if token < n)
    else:
        # Of the whole matrix: tensor parallelism then cuts U by rows, and V is copied.
        weights = recipe.weights
        side = SidecarArgs(rank=recipe.tables.rank, tile_m=0, tile_n=0, num_bits=4)
    group = ConfigGroup(targets=(module,), weights=weights, sidecar=side)
    return Table(LinearSpec(module, n, k, group, scale_dtype), stored, is_embedding, special)
