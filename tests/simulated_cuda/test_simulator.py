# SPDX-License-Identifier: Apache-2.0
"""The simulated GPU itself: it must refuse what PyTorch refuses, and leave nothing behind."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.simulated_cuda import on_gpu, simulated_cuda

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu() -> Iterator[None]:
    with simulated_cuda():
        yield


@pytest.fixture
def x(gpu: None) -> torch.Tensor:
    return torch.arange(6.0).view(2, 3).to("cuda")


MIXED: list[Callable[[torch.Tensor], Any]] = [
    lambda x: x + torch.ones(3),
    lambda x: torch.ones(2, 3).add_(x),
    lambda x: x.mul_(torch.ones(3)),
    lambda x: x @ torch.ones(3, 2),
    lambda x: torch.nn.functional.linear(x, torch.ones(4, 3)),
    lambda x: torch.cat([x, torch.ones(1, 3)]),
    lambda x: torch.stack([x[0, 0], torch.tensor(1.0)]),
    lambda x: torch.where(x > 1, x, torch.ones(3)),
    lambda x: torch.where(torch.ones(2, 3) > 0, x, 0.0),
    lambda x: torch.equal(x, x.cpu()),
    lambda x: x.gather(1, torch.zeros(2, 1, dtype=torch.int64)),
    lambda x: torch.searchsorted(torch.arange(3.0), x),
    lambda x: torch.nn.functional.embedding(torch.tensor([0]), x),
    lambda x: torch.ones(2, 3).index_put_((torch.tensor([0]),), x[0]),
    lambda x: torch.ones(()).add_(x[0, 0]),  # a scalar may be read from the CPU, not written there
    lambda x: torch.ones(3) + x[0, 0],  # only the CPU's scalars go anywhere
    lambda x: torch.bmm(x[None], torch.ones(1, 3, 2)),
    lambda x: torch.mm(x, x.T, out=torch.empty(2, 2)),
    lambda x: torch.linalg.solve(x @ x.T, torch.ones(2, 1)),
]


@pytest.mark.parametrize("mix", MIXED, ids=range(len(MIXED)))
def test_operands_on_two_devices_are_refused(
    x: torch.Tensor, mix: Callable[[torch.Tensor], Any]
) -> None:
    with pytest.raises(RuntimeError, match="on the same device"):
        mix(x)


@pytest.mark.parametrize("mix", MIXED, ids=range(len(MIXED)))
def test_the_same_on_one_device_is_not(mix: Callable[[torch.Tensor], Any]) -> None:
    """None of the above fails for another reason."""
    mix(torch.arange(6.0).view(2, 3))


def test_indices_may_be_on_the_cpu_but_not_the_other_way_round(x: torch.Tensor) -> None:
    rows = torch.tensor([1])
    assert x[rows].device == GPU
    assert x[rows.cuda()].tolist() == [[3.0, 4.0, 5.0]]
    x[rows] = 7.0
    x[rows, rows] = torch.tensor(9.0)
    assert x.tolist() == [[0.0, 1.0, 2.0], [7.0, 9.0, 7.0]]
    with pytest.raises(RuntimeError, match="on the same device"):
        x[rows] = torch.ones(3)
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        torch.ones(2, 3)[rows.cuda()]


def test_scalars_of_the_cpu_go_anywhere(x: torch.Tensor) -> None:
    assert (x * torch.tensor(2.0)).device == GPU
    assert torch.where(x > 1, x, 0.0).device == GPU
    assert x.masked_fill_(x > 1, torch.tensor(5.0)).tolist() == [[0.0, 1.0, 5.0], [5.0, 5.0, 5.0]]
    assert (torch.tensor(2.0) * x.sum()).item() == 42.0


def test_copies_cross_devices(x: torch.Tensor) -> None:
    host = torch.zeros(2, 3)
    assert host.copy_(x).device.type == "cpu"
    host[0] = x[1]
    assert host[0].numpy().tolist() == [3.0, 4.0, 5.0]
    x[:, 1] = torch.tensor([8.0, 9.0])
    assert x.device == GPU
    assert x.cpu()[:, 1].tolist() == [8.0, 9.0]
    assert x.to(host).device.type == "cpu"
    assert host.to(x.to(torch.int8)).dtype == torch.int8
    assert host.type_as(x).device == host.cuda().device == GPU


def test_moving_copies_only_where_something_changes(x: torch.Tensor) -> None:
    host = torch.zeros(3)
    assert x.to("cuda") is x
    assert x.cuda() is x
    assert host.cpu() is host
    assert host.to("cpu", torch.float32) is host
    there = host.to("cuda")
    there += 1
    back = there.cpu()
    back += 1
    assert (host.tolist(), there.tolist(), back.tolist()) == ([0.0] * 3, [1.0] * 3, [2.0] * 3)


def test_where_tensors_are_made(x: torch.Tensor) -> None:
    made = {
        "cuda": [
            torch.empty(2, device="cuda"),
            torch.tensor([1, 2], device="cuda:0"),
            torch.tensor(x),
            torch.as_tensor(x),
            torch.as_tensor(np.ones(2), device="cuda"),
            torch.arange(3, device=GPU),
            torch.arange(3, device=0),
            torch.ones(2).to(0),
            x.new_zeros(2),
            x.new_tensor([1.0]),
            torch.zeros_like(x),
            torch.zeros_like(torch.ones(2), device="cuda"),
            torch.randn(2, device="cuda", generator=torch.Generator("cuda").manual_seed(0)),
            x.T[1:].reshape(-1),
            copy.deepcopy(x),
            torch.nn.Parameter(x).data,
        ],
        "cpu": [
            torch.empty(2),
            torch.tensor([1, 2]),
            torch.zeros_like(x, device="cpu"),
            x.new_zeros(2, device="cpu"),
            torch.as_tensor(x, device="cpu"),
            torch.from_numpy(np.ones(2)),
        ],
        "meta": [torch.empty_like(x, device="meta"), x.to("meta")],
    }
    assert [[tensor.device.type for tensor in tensors] for tensors in made.values()] == [
        [name] * len(tensors) for name, tensors in made.items()
    ]
    assert x.is_cuda
    assert not x.is_cpu
    assert x.get_device() == 0
    assert torch.device(0) == torch.device("cuda:0") == x.device != torch.device("cuda")


def test_default_device(gpu: None) -> None:
    with torch.device("cuda"):
        layer = torch.nn.Linear(3, 2)
        assert {tensor.device for tensor in (torch.tensor([1]), torch.rand(2), layer.weight)} == {
            GPU
        }
        assert torch.zeros(1, device="cpu").device.type == "cpu"
        with pytest.raises(
            RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"
        ):
            torch.rand(2, generator=torch.Generator())
    assert torch.zeros(1).device.type == "cpu"


def test_modules_move_and_keep_their_ties(gpu: None) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4, bias=False), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4)
    )
    model[2].weight = model[0].weight
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    expected = model.eval()(inputs)
    parameter = model[0].weight
    model.to("cuda")
    assert parameter is model[0].weight is model[2].weight
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {GPU}
    with pytest.raises(RuntimeError, match="on the same device"):
        model(inputs)
    found = model(inputs.cuda())
    assert torch.equal(found.detach().cpu(), expected)
    found.sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.device == GPU
    seen = []
    found = model(inputs.cuda())
    found.register_hook(lambda gradient: seen.append(gradient.device))
    with pytest.raises(RuntimeError, match="grad_outputs"):
        torch.autograd.grad(found, parameter, torch.ones(5, 4))
    (gradient,) = torch.autograd.grad(found, parameter, torch.ones(5, 4, device="cuda"))
    assert (gradient.device, seen) == (GPU, [GPU])


def test_numpy_and_files(x: torch.Tensor, tmp_path: Path) -> None:
    for convert in (lambda: x.numpy(), lambda: np.asarray(x)):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            convert()
    assert x.cpu().numpy().shape == (2, 3)
    assert x.tolist()[1] == [3.0, 4.0, 5.0]
    save_file({"x": x}, tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], x.cpu())
    assert load_file(tmp_path / "x.safetensors", device="cuda")["x"].device == GPU


def test_what_is_not_simulated_says_so(x: torch.Tensor) -> None:
    for refused in (
        lambda: torch.randn(2, requires_grad=True).cuda(),
        lambda: x.type("torch.FloatTensor"),
        lambda: torch.tensor([x[0, 0]]),
    ):
        with pytest.raises(NotImplementedError, match="simulated"):
            refused()
    for refused in (
        lambda: torch.cuda.Stream(),
        lambda: torch.cuda.CUDAGraph(),
        lambda: torch.ones(1, device="cuda:1"),
    ):
        with pytest.raises(RuntimeError):
            refused()


def test_operators_of_others_run_their_own_function_in_the_simulation() -> None:
    seen = []

    def double(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.device)
        return tensor + torch.ones(3, device=tensor.device)

    with torch.library._scoped_library("simulated_cuda_test", "FRAGMENT") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", double, "CompositeExplicitAutograd")
        operator = torch.ops.simulated_cuda_test.double
        with simulated_cuda({operator.default: double}):
            assert operator(torch.zeros(2, 3, device="cuda")).device == GPU
        assert seen == [GPU]


def test_nothing_is_left_behind() -> None:
    generator, before = torch.Generator, dict(vars(torch.cuda))
    with simulated_cuda():
        tensor = torch.ones(2, device="cuda")
        assert torch.cuda.is_available()
        assert torch.cuda.get_device_capability() == (9, 0)
        with pytest.raises(RuntimeError, match="simulated already"), simulated_cuda():
            pass
    assert vars(torch.cuda) == before
    assert torch.Generator is generator
    assert on_gpu(tensor)
    assert tensor.device.type == "cpu"
    assert not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(2, device="cuda")
    assert torch.tensor([1]).device.type == "cpu"
