# SPDX-License-Identifier: Apache-2.0
"""Second moments of the output head's input."""

import contextlib
from typing import Any

import torch

from svsk_offline.calibration.block_runner import BlockRunner, StandIn
from svsk_offline.calibration.input_statistics import InputStatistics

__all__ = ["collect_head_input"]


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass before the head is multiplied with."""


@torch.no_grad()
def collect_head_input(
    runner: BlockRunner, tokens: torch.Tensor, *, full: bool
) -> tuple[InputStatistics, InputStatistics]:
    """Run what the last block gave through the rest of the model, up to the head.

    Args:
        runner: past the last block.
        tokens: the samples, int64 [samples, tokens].
        full: gather whole second-moment matrices, not only their diagonals.

    Returns:
        Statistics of the samples that are fitted, and of those held out; of the fitted ones again
        where none is.
    """
    source, hidden = runner.source, runner.hidden
    current = hidden[:1]
    given = StandIn(source.blocks[1][-1], lambda *_: current, members=runner.members)
    model: Any = source.model
    head = model.get_output_embeddings()
    parts = [
        InputStatistics(head.in_features, runner.device, full=full),
        InputStatistics(head.in_features, runner.device, full=True),
    ]
    fitted = len(hidden) - runner.held_out
    kinds = parts  # those that take in the present sample

    def before(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        for kind in kinds:
            kind.add(inputs[0])
        raise _Stop

    hook = head.register_forward_pre_hook(before)
    try:
        with (
            source.replaced_blocks([given]) as replaced,
            source.loaded_outside(runner.dtype, runner.device, head=False),
        ):
            for index, sample in enumerate(tokens):
                current = hidden[index : index + 1].to(runner.device, runner.dtype)
                if runner.apart:
                    kinds = [parts[index >= fitted]]
                with contextlib.suppress(_Stop):
                    replaced(input_ids=sample.unsqueeze(0).to(runner.device), use_cache=False)
    finally:
        hook.remove()
    return parts[0], parts[1]
