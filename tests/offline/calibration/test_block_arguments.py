# SPDX-License-Identifier: Apache-2.0
"""The arguments of decoder blocks: compared by value, and as they were at every call."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from svsk_kernels.errors import SvskError
from svsk_offline.calibration import BlockRunner, CalibrationSet
from svsk_offline.calibration.block_arguments import Comparison, containers
from svsk_offline.storage.dense_model import ModelSource


class Cache:
    def __init__(self, keys: torch.Tensor) -> None:
        self.layers = [{"keys": keys}]


class Slotted:
    __slots__ = ("length",)

    def __init__(self, length: int) -> None:
        self.length = length


@dataclass
class Mask:
    values: torch.Tensor


def above(limit: int) -> Callable[[int], bool]:
    return lambda place: place > limit


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (0.5, 0.25),
        (3, 4),
        (True, False),
        (1, 1.0),
        ("full", "sliding"),
        (None, 0),
        (torch.float32, torch.bfloat16),
        (torch.zeros(2), torch.ones(2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        ([1, 2], [1, 2, 3]),
        ((torch.ones(1), 1), (torch.ones(1), 2)),
        ({"a": 1}, {"b": 1}),
        ({"a": {"b": torch.ones(2)}}, {"a": {"b": torch.zeros(2)}}),
        (Cache(torch.ones(2)), Cache(torch.zeros(2))),
        (Slotted(1), Slotted(2)),
        (Mask(torch.ones(2)), Mask(torch.zeros(2))),
        (above(1), above(2)),
        (functools.partial(above, 1), functools.partial(above, 2)),
    ],
)
def test_values_are_compared(left: Any, right: Any) -> None:
    assert Comparison().difference(((), {"x": left}), ((), {"x": right})) is not None
    assert str(Comparison().difference(((left,), {}), ((right,), {}))).startswith("argument 0")


def test_equal_values_that_are_other_objects() -> None:
    def call() -> tuple[tuple[Any, ...], dict[str, Any]]:
        nan = torch.tensor([1.0, torch.nan])
        cache = Cache(torch.ones(2))
        cache.layers[0]["owner"] = cache  # refers back to itself
        rest = {
            "cache": cache,
            "slots": Slotted(1),
            "mask": Mask(nan),
            "where": above(3),
            "scale": float("nan"),
        }
        return (nan, [1, (2.5, "a")]), {
            **rest,
            "dtype": torch.float32,
            "partial": functools.partial(above, 1),
        }

    assert Comparison().difference(call(), call()) is None


def test_the_difference_is_named() -> None:
    left = ((), {"cache": Cache(torch.ones(2)), "rope": (torch.ones(1), torch.ones(2))})
    right = ((), {"cache": Cache(torch.zeros(2)), "rope": (torch.ones(1), torch.ones(2))})
    assert Comparison().difference(left, right) == "cache.layers[0].keys"


def test_containers_are_new_and_leaves_are_not() -> None:
    leaf = torch.ones(2)
    noted = {"a": [leaf, {"b": (leaf,)}]}
    kept = containers(noted)
    noted["a"].append(3)
    noted["a"][1]["c"] = 4  # type: ignore[call-overload,index]
    assert kept == {"a": [leaf, {"b": (leaf,)}]}
    assert kept["a"][0] is leaf


def runner(folder: Path, change: Callable[[nn.Module], None]) -> BlockRunner:
    source = ModelSource(folder)
    change(source.model)
    tokens = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0))
    return BlockRunner(
        source,
        CalibrationSet(tokens, "random", "0"),
        torch.device("cpu"),
        torch.float32,
        batch_tokens=16,
    )


def test_a_block_that_changes_its_arguments_does_not_change_the_next_call(tiny_llama: Path) -> None:
    class Greedy(nn.Module):
        def forward(self, hidden: torch.Tensor, *_: Any, **kwargs: Any) -> torch.Tensor:
            cosines = kwargs["position_embeddings"][0]
            cosines += 1.0
            kwargs.clear()
            return hidden * cosines.mean()

    found = runner(tiny_llama, lambda model: None)
    block = Greedy()
    once = found.forward(0, block, found.hidden[:1])
    assert torch.equal(found.forward(0, block, found.hidden[:1]), once)


@pytest.mark.parametrize("sample", [1, 2])
def test_a_scalar_that_depends_on_the_tokens_is_refused(tiny_llama: Path, sample: int) -> None:
    def change(model: Any) -> None:
        inner, seen = model.model.forward, dict[tuple[int, ...], None]()

        def forward(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            seen[tuple(input_ids.flatten().tolist())] = None  # some are run more than once
            scaling = 0.5 if len(seen) <= sample else 0.25
            return inner(*args, input_ids=input_ids, **kwargs, scaling=scaling)

        model.model.forward = forward

    with pytest.raises(SvskError, match=r"depend on the tokens \(block 0, scaling\)"):
        runner(tiny_llama, change)


def test_a_model_that_leaves_blocks_out_is_refused(tiny_llama: Path) -> None:
    def change(model: Any) -> None:
        inner = model.model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            model.config.num_hidden_layers = 1  # of two that it has
            try:
                return inner(*args, **kwargs)
            finally:
                model.config.num_hidden_layers = 2

        model.model.forward = forward

    with pytest.raises(
        SvskError,
        match=r"LlamaForCausalLM does not run its decoder blocks once each, one after the other",
    ):
        runner(tiny_llama, change)
