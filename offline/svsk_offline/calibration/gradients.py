# SPDX-License-Identifier: Apache-2.0
"""How much the model's predictions feel a change of each linear's output, block by block and back.

The KL divergence between the model's own predictions and those under a small change of some outputs
is half the quadratic form of the Fisher information: with labels drawn from the model's predictions
and g the gradient of their summed negative log-likelihood with respect to a linear's output, ``KL ~
1/2 E[(g . dy)^2]`` (Amari 1998; K-FAC, Martens and Grosse 2015, takes it apart into one factor of
the input and one of the output, as is done here).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from svsk_kernels.errors import SvskError
from svsk_offline.calibration.block_runner import BlockRunner, StandIn, scratch_tensor
from svsk_offline.calibration.room import UNLIMITED, Room
from svsk_offline.calibration.text import CalibrationSet
from svsk_offline.calibration.way_back import Observed, WayBack
from svsk_offline.storage.dense_model import ModelSource

__all__ = ["draw_labels", "sweep_gradients"]


Visit = Callable[[int, nn.Module, Observed], None]
"""Called per block, last block first, and where it takes turns per turn: with its number, the
loaded block, and what was gathered, which may be emptied on the way."""


def sweep_gradients(
    source: ModelSource,
    calibration: CalibrationSet,
    device: torch.device,
    dtype: torch.dtype,
    visit: Visit,
    *,
    full: bool,
    moments: bool = False,
    held_out: int = 0,
    seed: int = 0,
    places: Sequence[int] | None = None,
    room: Room = UNLIMITED,
    scratch: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    start: tuple[int, torch.Tensor] | None = None,
    passed: Callable[[int, torch.Tensor], None] = lambda index, gradient: None,
) -> None:
    """Run the samples forward through the model and the gradient of their loss back.

    One block is in memory at a time.

    The inputs of all blocks are kept, in memory or in a temporary file; the way back runs each
    block again from them, several times where what is gathered of its linears takes turns.

    Args:
        source: the dense model.
        calibration: the samples.
        device: where blocks run.
        dtype: floating dtype they run in.
        visit: what to do with each block's gradients.
        full: give ``visit`` whole second-moment matrices, not only their diagonals.
        moments: gather the second moments of the gradients of each output as well.
        held_out: samples, the last ones, whose inputs are kept apart.
        seed: of the labels drawn from the model's predictions.
        places: of each sample among those of all processes, ascending: it gets the labels that it
            gets in one process. None where these are all there are.
        room: what may be held at a time.
        scratch: folder for temporary files.
        progress: called with the number of blocks passed, both ways, and their total; those that
            an interrupted sweep passed on its way back are not among them.
        start: the last block that an interrupted sweep passed on its way back, and the gradient
            that it gave to ``passed`` there; None for a sweep from the start.
        passed: called after ``visit`` with the block's number and the gradient of the loss with
            respect to its inputs, float [samples, tokens, features], which changes afterwards.

    Raises:
        SvskError: the gradient is not finite.
    """
    name, blocks = source.blocks
    runner = BlockRunner(
        source,
        calibration,
        device,
        dtype,
        memory_limit=room.hidden,
        scratch=scratch,
        held_out=held_out,
    )
    inputs, file = scratch_tensor((len(blocks), *runner.hidden.shape), dtype, room.hidden, scratch)
    try:
        left = len(blocks) if start is None else start[0]
        for index, block in enumerate(blocks[:left]):
            inputs[index] = runner.hidden.to(inputs)
            source.load(block, f"{name}.{index}.", dtype, device)
            runner.advance(index, block)
            source.unload(block)
            progress(index + 1, 2 * left)
        gradient = runner.hidden
        if start is None:
            _loss_gradient(source, calibration.tokens, runner, seed, places)
        else:
            gradient.copy_(start[1])
        for index in reversed(range(left)):
            source.load(blocks[index], f"{name}.{index}.", dtype, device)
            back = WayBack(runner, index, blocks[index], inputs[index], gradient, full, moments)
            for observed in back.in_turns(room.statistics):
                for key, gradients in observed.gradients.items():
                    if not bool(torch.isfinite(gradients.rows).all()):
                        raise SvskError(
                            f"{name}.{index}.{key}: its output's gradient is not finite on the"
                            " calibration text. Is a weight of the model or of its head as good"
                            " as infinite?"
                        )
                visit(index, blocks[index], observed)
            source.unload(blocks[index])
            passed(index, gradient)
            progress(2 * left - index, 2 * left)
    finally:
        runner.close()
        if file is not None:
            file.close()


def _loss_gradient(
    source: ModelSource,
    tokens: torch.Tensor,
    runner: BlockRunner,
    seed: int,
    places: Sequence[int] | None,
) -> None:
    """Turn outputs of the last block into the gradient of the loss with respect to them, in place.

    The loss is the summed negative log-likelihood of labels drawn from the model's own predictions.
    """
    hidden, device, dtype = runner.hidden, runner.device, runner.dtype
    current = hidden[:1]
    given = StandIn(source.blocks[1][-1], lambda *_: current, members=runner.members)
    generator = torch.Generator(device).manual_seed(seed)
    before = 0
    with source.replaced_blocks([given]) as model, source.loaded_outside(dtype, device):
        for index, sample in enumerate(tokens):
            place = index if places is None else places[index]
            for _ in range(before, place):  # samples of other processes
                _uniform(len(sample), generator)
            before = place + 1
            current = hidden[index : index + 1].to(device, dtype).requires_grad_()
            with torch.enable_grad():
                logits = model(input_ids=sample.unsqueeze(0).to(device), use_cache=False).logits
            # Of the loss with respect to the logits, but for the labels.
            slope = logits[0].detach().float().softmax(-1)
            labels = draw_labels(slope, generator)
            slope[torch.arange(len(labels), device=device), labels] -= 1
            (back,) = torch.autograd.grad(logits, current, slope.unsqueeze(0).to(logits))
            hidden[index] = back[0].to(hidden)


def draw_labels(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One label per row, by inversion: ``torch.multinomial`` is many times slower here.

    Args:
        probabilities: float [T, V], on the generator's device.
        generator: seeded.

    Returns:
        int64 [T]; a label of probability 0 is never drawn, except by a uniform number of exactly 0.
    """
    running = probabilities.cumsum(-1)
    uniform = _uniform(len(running), generator)
    drawn = torch.searchsorted(running, uniform * running[:, -1:]).clamp_(max=running.shape[-1] - 1)
    return drawn.squeeze(1)


def _uniform(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(count, 1, generator=generator, device=generator.device)
