# SPDX-License-Identifier: Apache-2.0
"""A GGUF file of the same model gives metadata, tokenizer, names, and the form of each tensor.

Weights are the checkpoint's, dense ones too. The template's own values serve to find out in which
order and form llama.cpp stores them, so that no architecture needs a converter here.
"""

from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch

from svsk_kernels.errors import SvskError, one_line
from svsk_offline.export.gguf.file import Describe, GgufTensor, dense_bytes, dense_type
from svsk_offline.export.gguf.plan import (
    Placed,
    Plan,
    file_type,
    gguf_names,
    linear_tensor,
    weight_in_order,
)
from svsk_offline.export.gguf.row_order import closest, head_counts, row_orders
from svsk_vllm.format import Checkpoint, dequantize

__all__ = ["template_plan"]

_OF_THE_FILE: Final = ("GGUF.", "split.", "quantize.")
_WRITTEN_ANEW: Final = (
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
)
_HEAD: Final = "output.weight"


def template_plan(source: Checkpoint, template: Path) -> Plan:
    """Plan a file that is the template with the checkpoint's weights.

    Args:
        source: the checkpoint.
        template: GGUF of the same model, of any type of four bits or more.

    Raises:
        SvskError: the template cannot be read, or is not of this model.
    """
    reader = _read(template)
    architecture = str(_field(reader, template, "general.architecture"))
    parts = reader.fields.get("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise SvskError(
            f"--template {template}: one file of several. Join them with llama.cpp's"
            " llama-gguf-split --merge."
        )
    stored_as = {new: name for name, new in gguf_names(source, architecture).items()}
    tied = bool(source.hf_config.get("tie_word_embeddings"))
    tensors: list[GgufTensor] = []
    placed: dict[str, Placed] = {}
    for tensor in reader.tensors:
        name = stored_as.get(tensor.name)
        module = (name or "").removesuffix(".weight")
        if name is None:
            # llama.cpp takes a head that is not there for tied
            if tensor.name != _HEAD or not tied:
                tensors.append(_copied(tensor))
        elif module in source.linears:
            placed[module] = _place(source, module, tensor)
            tensors.append(linear_tensor(source, module, placed[module]))
        else:
            tensors.append(_dense(source, name, tensor))
    missing = [module for module in source.linears if module not in placed]
    if missing:
        raise SvskError(
            f"--template {template}: has no tensor for {missing[0]}, and for {len(missing)} of the"
            " checkpoint's in all. Name a template of this very model."
        )
    return Plan(architecture, _metadata(source, reader, placed), tensors, placed)


def _read(template: Path) -> Any:
    try:
        return gguf.GGUFReader(template)
    # what it meets in a damaged file depends on where the damage is
    except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise SvskError(
            f"--template {template}: not a GGUF file that can be read ({one_line(error)})."
        ) from error


def _field(reader: Any, template: Path, key: str) -> Any:
    if key not in reader.fields:
        raise SvskError(f"--template {template}: has no {key}. Name a GGUF file of a model.")
    return reader.fields[key].contents()


def _metadata(source: Checkpoint, reader: Any, placed: dict[str, Placed]) -> Describe:
    def describe(writer: Any) -> None:
        for key, field in reader.fields.items():
            if key.startswith(_OF_THE_FILE) or key in _WRITTEN_ANEW or not field.types:
                continue
            kind, contents = field.types[0], field.contents()
            is_array = kind == gguf.GGUFValueType.ARRAY
            if is_array and not contents:
                continue
            inner = field.types[-1] if is_array else None
            writer.add_key_value(key, contents, kind, sub_type=inner)
        writer.add_file_type(file_type(source, placed))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    return describe


def _values(tensor: Any) -> torch.Tensor:
    """float32 values of a template's tensor, the row length last."""
    values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return torch.from_numpy(values).reshape(shape)


def _copied(tensor: Any) -> GgufTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return GgufTensor(tensor.name, tensor.tensor_type.name, shape, lambda: tensor.data)


def _place(source: Checkpoint, module: str, tensor: Any) -> Placed:
    spec = source.linears[module]
    template = _values(tensor)
    _require_shape(module, (spec.n, spec.k), tuple(template.shape))
    weight = dequantize(source.read_linear(module))
    orders = row_orders(spec.n, head_counts(source.hf_config))
    return Placed(tensor.name, closest(module, weight, template, orders))


def _dense(source: Checkpoint, name: str, tensor: Any) -> GgufTensor:
    """The checkpoint's own dense tensor, in the form of the template's."""
    stored, template = source.read_dense(name), _values(tensor)
    if stored.numel() != template.numel():
        _require_shape(name, tuple(stored.shape), tuple(template.shape))
    stored = stored.reshape(template.shape)
    # Gemma, Nemotron: a norm's weight is 1 plus what is stored, llama.cpp has the sum
    plus_one = stored.float() + 1
    if name.endswith("norm.weight") and stored.ndim == 1 and _nearer(plus_one, stored, template):
        stored = plus_one
    orders = row_orders(len(stored), head_counts(source.hf_config))
    order = closest(name, stored.float(), template, orders)
    in_order = weight_in_order(stored, order)
    return GgufTensor(
        tensor.name,
        dense_type(in_order),
        tuple(in_order.shape),
        lambda: dense_bytes(in_order),
    )


def _nearer(one: torch.Tensor, other: torch.Tensor, to: torch.Tensor) -> bool:
    return float((one - to).norm()) < float((other.float() - to).norm())


def _require_shape(name: str, own: tuple[int, ...], other: tuple[int, ...]) -> None:
    if own != other:
        raise SvskError(
            f"{name}: shape {list(own)}, the template has {list(other)}. Name a template of this"
            " very model."
        )
