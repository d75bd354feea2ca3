# SPDX-License-Identifier: Apache-2.0
"""The order in which a model's own loader hands on the rows of a stored weight."""

from typing import Any

import torch

from svsk_vllm.format import SvskFormatError
from svsk_vllm.format.row_order import ROW_ORDERS

__all__ = ["stored_row_order"]

_FALCON = ("FalconForCausalLM", "RWForCausalLM")
_stand_ins: list[
    torch.nn.Module
] = []  # vLLM remembers models by id(), which must not be given to another one


def stored_row_order(
    architecture: str, hf_config: Any, module: str, rows: int
) -> torch.Tensor | None:
    """Stored row of each row that vLLM's model hands to the layer's loader.

    Row numbers are loaded by the model's own code, in a stand-in of one parameter, so that the
    order is vLLM's.

    Args:
        architecture: as in config.json.
        hf_config: the model's configuration, from which the loader takes the number of heads.
        module: name of the linear.
        rows: of the stored weight.

    Returns:
        int64 [rows], None where the stored order is kept.

    Raises:
        SvskFormatError: vLLM's loader has changed and does not take row numbers.
    """
    if architecture not in _FALCON or module.rpartition(".")[2] != "query_key_value":
        return None
    from vllm.model_executor.models.falcon import FalconModel

    arrived: list[torch.Tensor] = []
    stand_in = FalconModel.__new__(FalconModel)
    torch.nn.Module.__init__(stand_in)
    stand_in.config = hf_config
    probe = torch.nn.Parameter(
        torch.zeros(rows, dtype=torch.int64, device="cpu"), requires_grad=False
    )
    probe.output_dim = 0  # type: ignore[attr-defined]
    probe.weight_loader = lambda _, loaded: arrived.append(loaded)  # type: ignore[attr-defined]
    stand_in.query_key_value = torch.nn.Module()
    stand_in.query_key_value.weight_packed = probe
    _stand_ins.append(stand_in)
    numbers = torch.arange(rows, device="cpu")
    try:
        FalconModel.load_weights(stand_in, [("query_key_value.weight_packed", numbers)])
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise SvskFormatError(
            f"{module}: {_changed(architecture)} ({type(error).__name__}: {error})."
        ) from error
    if len(arrived) != 1 or not torch.equal(arrived[0].sort().values, numbers):
        raise SvskFormatError(f"{module}: {_changed(architecture)}.")
    return arrived[0]


def _changed(architecture: str) -> str:
    return (
        f"{ROW_ORDERS[architecture].reason}, in a way that this version of the plugin does not"
        " know. Serve it with the vLLM it was tested with, or put the module on the ignore list"
        " (--ignore) when quantising"
    )
