# SPDX-License-Identifier: Apache-2.0
"""A CUDA device that is not there: finds operations that mix devices on a machine with a CPU only.

Inside :func:`simulated_cuda` a tensor is "on the GPU" when its storage carries a mark. Its memory,
and all arithmetic, is the CPU's, so results are those of a CPU run bit for bit. Two modes keep up
the appearance:

- a dispatch mode sees every operation below autograd. It refuses what PyTorch refuses (tensors of
  several devices, but for scalars, indices and copies), turns ``device="cuda"`` into ``"cpu"`` and
  marks what an operation allocates;
- a function mode answers what Python asks of a tensor (``device``, ``to``, ``cpu``, ``numpy`` ...).

The dispatch mode poses as the one of fake tensors, which PyTorch does not initialise CUDA under.
Marks live on storages and not in a tensor subclass, because vLLM's parameters are tensor subclasses
of their own.

What cannot be simulated raises: other GPUs than the first, streams, events and graphs, gradients
through copies between devices, sparse tensors. Two limits to know: a Python function of torch that
makes tensors on ``x.device`` sees the CPU there, and so may raise where a GPU would not; operators
of other libraries are checked, but not entered unless they are among ``kernels``.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["GPU_NAME", "on_gpu", "simulated_cuda"]

GPU_NAME: Final = "Simulated GPU"
_CPU: Final = torch.device("cpu")
_GPU: Final = torch.device("cuda", 0)
_MARK: Final = "simulated_cuda"
_aten: Final = torch.ops.aten

_COPIES: Final = {_aten.copy_.default, _aten.copy.default, _aten._to_copy.default}
"""Operations between devices."""

_INDEXING: Final = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
}
"""Operations whose second argument, the indices, may be on the CPU; and a single value too."""

_PROPERTIES: Final = SimpleNamespace(
    name=GPU_NAME,
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    shared_memory_per_block_optin=232448,
    warp_size=32,
    gcnArchName="",
)


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on the simulated GPU."""
    with torch._C.DisableTorchFunction():
        if tensor.layout is not torch.strided:
            raise NotImplementedError(
                f"A tensor of layout {tensor.layout} cannot be simulated on a GPU."
            )
        return not tensor.is_meta and getattr(torch.Tensor.untyped_storage(tensor), _MARK, False)


def _mark(tensor: torch.Tensor, gpu: bool) -> torch.Tensor:
    with torch._C.DisableTorchFunction():
        if tensor.device == _CPU:
            setattr(torch.Tensor.untyped_storage(tensor), _MARK, gpu)
    return tensor


def _is_gpu(device: Any) -> bool:
    """Whether a device as a caller names it is the simulated one.

    Raises:
        RuntimeError: it is another GPU.
    """
    with torch._C.DisableTorchFunction():
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type == "cuda" and found.index not in (None, 0):
        raise RuntimeError(f"CUDA error: invalid device ordinal ({found}; one GPU is simulated)")
    return found.type == "cuda"


def _tensors(nest: Any) -> list[torch.Tensor]:
    """Tensors in a nest of tuples, lists and dictionaries."""
    if isinstance(nest, torch.Tensor):
        return [nest]
    if isinstance(nest, Mapping):
        nest = nest.values()
    elif not isinstance(nest, tuple | list):
        return []
    return [tensor for part in nest for tensor in _tensors(part)]


class _Operations(TorchDispatchMode):
    """Checks the devices of every operation and marks its results."""

    def __init__(self, kernels: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self._kernels = kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        operands = _tensors((args, kwargs))
        gpu = _operands_on_gpu(func, args, kwargs, operands)
        if kwargs.get("device") is not None and _is_gpu(kwargs["device"]):
            gpu, kwargs["device"] = True, _CPU
        kwargs |= {"pin_memory": False} if "pin_memory" in kwargs else {}
        if func in self._kernels:
            with _simulation(self._kernels):
                return self._kernels[func](*args, **kwargs)
        result = func(*args, **kwargs)
        if gpu:
            known = {tensor.untyped_storage()._cdata for tensor in operands}
            for tensor in _tensors(result):
                if tensor.untyped_storage()._cdata not in known:
                    _mark(tensor, True)
        return result


def _operands_on_gpu(
    func: Any, args: Any, kwargs: Mapping[str, Any], operands: list[torch.Tensor]
) -> bool:
    """Whether an operation runs on the GPU.

    Raises:
        RuntimeError: as PyTorch where the operands are on several devices.
    """
    places = [on_gpu(tensor) for tensor in operands]
    if func in _COPIES or all(places) or not any(places):
        return places[0] if places else False
    scalars_allowed = torch.Tag.pointwise in func.tags or func in (
        _aten.fill_.Tensor,
        _aten.masked_fill_.Tensor,
    )
    indices: set[int] = set()
    if func in _INDEXING:
        if not on_gpu(args[0]):
            _refuse(
                func,
                operands,
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)",
            )
        indices, scalars_allowed = {id(tensor) for tensor in _tensors(args[1])}, True
    written = {id(tensor) for tensor in _written(func, args, kwargs)}
    for tensor, gpu in zip(operands, places, strict=True):
        scalar = tensor.dim() == 0 and scalars_allowed and id(tensor) not in written
        if not (gpu or scalar or id(tensor) in indices):
            _refuse(func, operands, "Expected all tensors to be on the same device")
    return True


def _written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Operands that an operation writes to."""
    named = {
        argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)
    } | kwargs
    writes = {
        a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write
    }
    return _tensors([value for name, value in named.items() if name in writes])


def _refuse(func: Any, operands: list[torch.Tensor], message: str) -> None:
    found = ", ".join(f"{'cuda:0' if on_gpu(t) else t.device} {list(t.shape)}" for t in operands)
    raise RuntimeError(f"{message}, but got {found} (when checking arguments of {func})")


class _Questions(TorchFunctionMode):
    """Answers what Python asks of tensors, and moves them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if type(kwargs.get("device")) is int:
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        answer = _ANSWERS.get(func)
        if answer is not None:
            return answer(func, args, kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        if (
            kwargs.get("device") is not None
        ):  # what is asked for, not what a like-function's argument has
            _mark(result, _is_gpu(kwargs["device"]))
        generator = kwargs.get("generator")
        if generator is not None and (generator.device.type == "cuda") != on_gpu(result):
            wanted = "cuda" if on_gpu(result) else "cpu"
            raise RuntimeError(
                f"Expected a '{wanted}' device type for generator but found"
                f" '{generator.device.type}'"
            )
        return result


def _move(tensor: torch.Tensor, gpu: bool, copy: bool, **options: Any) -> torch.Tensor:
    """A tensor on a device: itself where nothing changes, else a copy."""
    if on_gpu(tensor) == gpu and tensor.device.type != "meta":
        return tensor.to(copy=copy, **options) if copy or options else tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "Gradients through a copy between devices cannot be simulated. Use detach()."
        )
    return _mark(tensor.to(device=_CPU, copy=True, **options), gpu)


def _to(func: Any, args: Any, kwargs: Any) -> torch.Tensor:
    tensor, rest = (
        args[0],
        tuple(torch.device("cuda", arg) if type(arg) is int else arg for arg in args[1:]),
    )
    other = rest[0] if rest and isinstance(rest[0], torch.Tensor) else kwargs.get("other")
    copy = kwargs.get("copy", False)
    if other is not None:
        copy = copy or (rest[2:3] == (True,))
        return _move(tensor, on_gpu(other), copy, dtype=other.dtype)
    plain = {key: value for key, value in kwargs.items() if key not in ("copy", "memory_format")}
    device, dtype, _, memory_format = torch._C._nn._parse_to(*rest, **plain)
    if len(rest) > 3 or any(value is True for value in rest[2:]):
        raise NotImplementedError("Give non_blocking and copy of Tensor.to by name.")
    if device is not None and device.type not in ("cpu", "cuda"):
        return func(*args, **kwargs)
    options = {"dtype": dtype, "memory_format": kwargs.get("memory_format", memory_format)}
    gpu = on_gpu(tensor) if device is None else _is_gpu(device)
    return _move(
        tensor, gpu, copy, **{key: value for key, value in options.items() if value is not None}
    )


def _to_numpy(func: Any, args: Any, kwargs: Any) -> Any:
    if on_gpu(args[0]):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )
    return func(*args, **kwargs)


def _from_data(func: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """``torch.tensor``, ``as_tensor`` and ``asarray``, which also copy tensors."""
    data, device = (
        args[0] if args else kwargs["data"],
        kwargs.get("device") or torch.utils._device.CURRENT_DEVICE,
    )
    if device is not None and torch.device(device).type == "meta":
        return func(*args, **kwargs)
    if isinstance(data, torch.Tensor):
        gpu = on_gpu(data) if device is None else _is_gpu(device)
        dtype = {} if kwargs.get("dtype") is None else {"dtype": kwargs["dtype"]}
        return _move(
            data.detach() if func is torch.tensor else data, gpu, func is torch.tensor, **dtype
        )
    if any(map(on_gpu, _tensors(data))):
        raise NotImplementedError(
            f"{func.__name__} of a nest of GPU tensors is not simulated. Use torch.stack."
        )
    made = func(*args, **{**kwargs, "device": _CPU})
    return (
        _move(made.detach(), True, True).requires_grad_(made.requires_grad)
        if device and _is_gpu(device)
        else made
    )


def _new_tensor(func: Any, args: Any, kwargs: Any) -> torch.Tensor:
    device = kwargs.pop("device", None)
    return _mark(func(*args, **kwargs), on_gpu(args[0]) if device is None else _is_gpu(device))


def _gradients(func: Any, args: Any, kwargs: Any) -> Any:
    outputs, given = (
        _tensors(args[0]),
        _tensors(args[2] if len(args) > 2 else kwargs.get("grad_outputs")),
    )
    for output, gradient in zip(outputs, given, strict=False):
        if on_gpu(output) != on_gpu(gradient):
            raise RuntimeError(
                "Expected grad_outputs on the device of the outputs, but got tensors of two devices"
            )
    return func(*args, **kwargs)


def _not_simulated(func: Any, args: Any, kwargs: Any) -> Any:
    if any(map(on_gpu, _tensors((args, kwargs)))):
        raise NotImplementedError(
            f"{func.__name__} of a tensor on the simulated GPU is not simulated."
        )
    return func(*args, **kwargs)


_T = torch.Tensor
_ANSWERS: Final[dict[Any, Callable[[Any, Any, Any], Any]]] = {
    _T.device.__get__: lambda func, args, _: _GPU if on_gpu(args[0]) else func(*args),
    _T.is_cuda.__get__: lambda _, args, __: on_gpu(args[0]),
    _T.is_cpu.__get__: lambda func, args, _: func(*args) and not on_gpu(args[0]),
    _T.get_device: lambda func, args, _: 0 if on_gpu(args[0]) else func(*args),
    _T.to: _to,
    _T.cuda: lambda _, args, kwargs: _move(
        args[0], _is_gpu(kwargs.get("device", args[1] if args[1:] else _GPU)), False
    ),
    _T.cpu: lambda _, args, __: _move(args[0], False, False),
    _T.type_as: lambda _, args, __: _move(args[0], on_gpu(args[1]), False, dtype=args[1].dtype),
    _T.numpy: _to_numpy,
    _T.__array__: _to_numpy,
    _T.__deepcopy__: lambda func, args, kwargs: _mark(func(*args, **kwargs), on_gpu(args[0])),
    _T.pin_memory: lambda func, args, kwargs: _not_simulated(_T.clone, args, {}),
    _T.new_tensor: _new_tensor,
    torch.tensor: _from_data,
    torch.as_tensor: _from_data,
    torch.asarray: _from_data,
    torch.autograd.grad: _gradients,
    torch.device: lambda func, args, kwargs: (
        func("cuda", *args) if args and type(args[0]) is int else func(*args, **kwargs)
    ),
    **dict.fromkeys(
        (_T.new, _T.type, _T.__dlpack__, _T.__reduce_ex__, _T.share_memory_, _T.set_),
        _not_simulated,
    ),
}


class _Generator(torch.Generator):
    """A generator of either device; that of the GPU gives the CPU's numbers."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        made = super().__new__(cls, "cpu")
        made._simulated = _GPU if _is_gpu(device) else _CPU
        return made

    @property
    def device(self) -> torch.device:
        return self._simulated


_engine: Final = torch.autograd._engine_run_backward


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    """Run a backward pass; its hooks ask tensors for their devices as well."""
    with _Questions():
        return _engine(*args, **kwargs)


def _patches() -> dict[str, Any]:
    """Attributes of ``torch.cuda`` inside the context."""
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(_is_gpu(device)),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0, device=_GPU),
        "get_device_name": lambda device=None: GPU_NAME,
        "get_device_properties": lambda device=None: _PROPERTIES,
        "get_device_capability": lambda device=None: (_PROPERTIES.major, _PROPERTIES.minor),
        "mem_get_info": lambda device=None: (_PROPERTIES.total_memory, _PROPERTIES.total_memory),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "manual_seed_all": lambda seed: None,
    }


@contextlib.contextmanager
def _simulation(kernels: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    with _Operations(kernels), _Questions():
        yield


@contextlib.contextmanager
def simulated_cuda(kernels: Mapping[Any, Callable[..., Any]] | None = None) -> Iterator[None]:
    """While inside, ``torch.device("cuda")`` is a GPU of capability 9.0 that computes as the CPU.

    Tensors on it lose their device when the context ends: use none of them afterwards.

    Args:
        kernels: by overload of an operator (``torch.ops.library.name.default``), the Python
            function that it runs; inside that function devices are simulated as well.

    Raises:
        RuntimeError: there is a real GPU, or a simulated one already.
    """
    if torch.cuda.is_available():
        raise RuntimeError("A GPU is there, or simulated already: nothing to simulate.")
    only_lift = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(
        True
    )  # torch.tensor(..., device="cuda") ends in a copy that a mode sees
    try:
        with (
            mock.patch.multiple(torch.cuda, **_patches()),
            mock.patch.object(torch, "Generator", _Generator),
            mock.patch.object(torch.autograd, "_engine_run_backward", _run_backward),
            _simulation(kernels or {}),
        ):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(only_lift)
