# SPDX-License-Identifier: Apache-2.0
"""The base of an SVSK checkpoint as a W4A16 checkpoint of compressed-tensors."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from svsk_kernels.errors import SvskError
from svsk_offline.export.folder import Progress, Say, write_folder
from svsk_vllm.format import Checkpoint, LinearSpec, pack_codes, restored_weight

__all__ = ["export_compressed_tensors", "w4a16_config"]

_GROUP_SIZES: Final = (32, 64)
"""What vLLM's W4A16 kernels take of the format's group sizes (Marlin: 32, 64 and 128)."""
_IN_BLOCK: Final = re.compile(r"\.\d+\.")


def export_compressed_tensors(
    checkpoint: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    say: Say = lambda text: None,
) -> Path:
    """Drop the sidecars and say in compressed-tensors' words what is left.

    Quality is not that of a W4A16 quantiser, whose codes make up for no sidecar. Scales in two
    levels are multiplied out, which is exact. A quantised embedding or output head is stored dense,
    its sidecar included: engines read no such table from this format.

    Args:
        checkpoint: SVSK folder whose linears have the codebook int4.
        out: folder to write.
        overwrite: replace ``out``.
        progress: called with finished and total shards.
        say: told of files that are left out.

    Raises:
        SvskFormatError: the checkpoint is damaged.
        SvskError: ``out`` exists, or a linear does not fit the format.
    """
    return write_folder(
        checkpoint,
        out,
        _convert,
        _config,
        overwrite=overwrite,
        suffix="converting",
        progress=progress,
        say=say,
    )


def _is_table(module: str) -> bool:
    """Whether it is an embedding or output head: what is quantised outside the blocks."""
    return not _IN_BLOCK.search(module)


def _config(source: Checkpoint) -> dict[str, Any]:
    by_group: dict[int, list[str]] = {}
    for name, spec in source.linears.items():
        if not _is_table(name):
            _require_w4a16(source, spec)
            by_group.setdefault(spec.group_size, []).append(name)
    # vLLM looks for every linear among the targets and stops where one is in neither list.
    tables = [name for name in source.linears if _is_table(name)]
    dense = [
        name.removesuffix(".weight")
        for name in source.dense_names
        if name.endswith(".weight") and len(source.tensors.describe(name).shape) == 2
    ]
    return w4a16_config(by_group, [*tables, *dense])


def _require_w4a16(source: Checkpoint, spec: LinearSpec) -> None:
    where = f"{source.folder}: {spec.name}"
    other = "or export with `--to dense`"
    if spec.scheme.weights.codebook != "int4":
        raise SvskError(
            f"{where} has codebook {spec.scheme.weights.codebook!r}, W4A16 needs 'int4'. Quantise"
            f" with `--codebook int4`, {other}."
        )
    if spec.group_size not in _GROUP_SIZES:
        raise SvskError(
            f"{where} has groups of {spec.group_size}, W4A16 kernels take {_GROUP_SIZES}. Quantise"
            f" with `--group-size 32`, {other}."
        )
    if ".experts." in spec.name:
        raise SvskError(
            f"{where} is an expert, whose layout in this format is not written. Export with"
            " `--to dense`."
        )


def _convert(source: Checkpoint, module: str) -> dict[str, torch.Tensor]:
    linear = source.read_linear(module)
    if _is_table(module):
        return {f"{module}.weight": restored_weight(linear)}
    return {
        f"{module}.weight_packed": pack_codes(linear.codes),
        f"{module}.weight_scale": linear.scale,
        f"{module}.weight_shape": torch.tensor([linear.spec.n, linear.spec.k]),
    }


def w4a16_config(
    by_group: Mapping[int, Sequence[str]], ignore: Sequence[str] = ("lm_head",)
) -> dict[str, Any]:
    """The ``quantization_config`` of a compressed-tensors model.

    Args:
        by_group: names of the linears by group size.
        ignore: names of the modules that are stored dense.
    """
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{size}": _group(size, names) for size, names in by_group.items()},
        # a tied head is stored under the embedding's name only
        "ignore": sorted({"lm_head", *ignore}),
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
