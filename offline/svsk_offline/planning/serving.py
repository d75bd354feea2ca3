# SPDX-License-Identifier: Apache-2.0
"""What vLLM will say of a checkpoint, asked before any work is done for it."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

from svsk_kernels.errors import SvskError
from svsk_offline.storage.dense_model import ModelSource
from svsk_vllm.format import ConfigGroup
from svsk_vllm.format.architectures import VllmClass, vllm_class
from svsk_vllm.format.experts import expert_problems
from svsk_vllm.format.row_order import row_order_problem

__all__ = ["bases_alone", "check_servable", "dense_matrices", "vllm_class_of"]


def vllm_class_of(source: ModelSource) -> VllmClass:
    """What vLLM makes of a model's class."""
    return vllm_class(source.config_dict, type(source.model).__name__)


def bases_alone(source: ModelSource, linears: Iterable[str]) -> str | None:
    """Why linears of a model can have no sidecar, although they can have a base; None if they can.

    Args:
        source: the dense model.
        linears: those to quantise, by full name.
    """
    names = [vllm_class_of(source).name]
    for linear in linears:
        problem = row_order_problem(names, linear, 1)
        if problem and not row_order_problem(names, linear, 0):
            return problem
    return None


def dense_matrices(source: ModelSource, schemes: Collection[str]) -> dict[str, int]:
    """Tensors of the blocks, vectors left out, that are not quantised: routers, convolutions, ...

    Args:
        source: the dense model.
        schemes: names of the linears to quantise.

    Returns:
        How many there are, by the stored name with ``*`` for each number in it.
    """
    replaced = {f"{name}.weight" for name in schemes}
    names = (
        name
        for index in range(len(source.blocks[1]))
        for name in source.block_tensors(index)
        if name not in replaced and len(source.tensors.describe(name).shape) > 1
    )
    return dict(Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))


def check_servable(
    source: ModelSource,
    schemes: Mapping[str, ConfigGroup],
    message: Callable[[str], None] = lambda text: None,
    *,
    most: int = 0,
) -> None:
    """Refuse schemes that vLLM would refuse, or serve wrong.

    Args:
        source: the dense model.
        schemes: of the linears to quantise, by full name.
        message: told what vLLM may not do with the model's class.
        most: the largest rank that a linear may yet be given.

    Raises:
        SvskError: part of what vLLM fuses is not quantised, or its bases differ, or vLLM's loader
            moves the rows of a linear and not those of its sidecar. Names the linears and what to
            do.
    """
    architecture = vllm_class_of(source)
    linears = {linear: schemes.get(linear) for linear in source.block_linears()}
    problems = architecture.fused_problems(linears) + expert_problems(linears)
    for linear, group in schemes.items():
        if problem := row_order_problem([architecture.name], linear, max(group.sidecar.rank, most)):
            problems.append(problem)
    if problems:
        more = f" And {len(problems) - 1} more like it." if len(problems) > 1 else ""
        raise SvskError(problems[0] + more)
    if note := architecture.note():
        message(note)
