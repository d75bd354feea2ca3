# SPDX-License-Identifier: Apache-2.0
"""The base of an SVSK checkpoint as a W4A16 checkpoint of compressed-tensors, to compare speed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from svsk_eval.errors import EvalError
from svsk_offline.storage.atomic import PartialFolder, write_json, write_tensors
from svsk_offline.storage.side_files import copy_side_files
from svsk_vllm.format import Checkpoint, pack_codes
from svsk_vllm.format.config import undeclared
from svsk_vllm.format.shards import SINGLE_NAME

__all__ = ["w4a16_config", "write_w4a16"]


def write_w4a16(checkpoint: Path, out: Path) -> Path:
    """Drop the sidecars and say in compressed-tensors' words what is left.

    Quality is not that of a W4A16 quantiser. Scales in two levels are multiplied out.

    Args:
        checkpoint: SVSK folder whose linears all have the codebook int4.
        out: folder to write; must not exist.

    Raises:
        EvalError: a linear has another codebook.
        SvskError: ``out`` exists.
    """
    source = Checkpoint(checkpoint)
    by_group: dict[int, list[str]] = {}
    for name, spec in source.linears.items():
        if spec.scheme.weights.codebook != "int4":
            raise EvalError(
                f"{checkpoint}: {name} has codebook {spec.scheme.weights.codebook!r},"
                " W4A16 needs 'int4'."
            )
        by_group.setdefault(spec.group_size, []).append(name)
    folder = PartialFolder(out, source.folder, suffix="converting")
    folder.discard()
    partial = folder.create()
    tensors = {name: source.read_dense(name) for name in source.dense_names}
    for name, linear in source.iter_linears():
        tensors |= {
            f"{name}.weight_packed": pack_codes(linear.codes),
            f"{name}.weight_scale": linear.scale,
            f"{name}.weight_shape": torch.tensor([linear.spec.n, linear.spec.k]),
        }
    write_tensors(partial / SINGLE_NAME, tensors)
    write_json(
        partial / "config.json",
        undeclared(source.hf_config) | {"quantization_config": w4a16_config(by_group)},
    )
    copy_side_files(source.folder, partial, lambda text: None, code=True)
    return folder.commit()


def w4a16_config(by_group: Mapping[int, Sequence[str]]) -> dict[str, Any]:
    """The ``quantization_config`` of a compressed-tensors model.

    Args:
        by_group: names of the linears by group size.
    """
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{size}": _group(size, names) for size, names in by_group.items()},
        "ignore": ["lm_head"],
    }


def _group(size: int, names: Sequence[str]) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": size,
    }
    return {
        "targets": list(names),
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
