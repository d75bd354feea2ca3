# SPDX-License-Identifier: Apache-2.0
"""What vLLM asks a quantisation method: which layers, and by which method."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from svsk_vllm.architecture import require_sound
from svsk_vllm.format import ConfigGroup, SvskCheckpointConfig, SvskFormatError
from svsk_vllm.plugin.linear import SvskLinearMethod

__all__ = ["SvskConfig"]

_RANKS_STATE = re.compile(r"model-rank-\d+-part-")


class SvskConfig(QuantizationConfig):
    """vLLM's view of the ``quantization_config`` of an SVSK checkpoint.

    Args:
        checkpoint: the checked configuration.
    """

    def __init__(self, checkpoint: SvskCheckpointConfig) -> None:
        super().__init__()
        self.checkpoint = checkpoint

    def get_name(self) -> str:
        return "svsk"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # everything is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SvskConfig":
        """Check the configuration.

        Raises:
            SvskFormatError: unknown key, wrong value or unknown version.
        """
        return cls(SvskCheckpointConfig.from_dict(config, "config.json: quantization_config"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim checkpoints of this format, whatever the user's flag says."""
        return "svsk" if hf_quant_cfg.get("quant_method") == "svsk" else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Refuse a folder that `svsk validate` would refuse, before vLLM builds its model.

        Of a model from the hub nothing but config.json is here yet, and a folder of config.json alone is loaded with
        random weights. What a sharded-state folder holds are parameters of vLLM's own.

        Raises:
            SvskFormatError: names what is wrong.
        """
        folder = Path(model_name)
        if folder.is_dir() and any(not _RANKS_STATE.match(path.name) for path in folder.glob("*.safetensors")):
            require_sound(folder, hf_config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Translate module names of the configuration to those of the vLLM model."""
        self.checkpoint = self.checkpoint.rename(hf_to_vllm_mapper.apply_list)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Method for one layer.

        Raises:
            SvskFormatError: parts of a fused layer disagree, or the layer is quantised in a way that is not served.
        """
        if isinstance(layer, ParallelLMHead):
            if self.checkpoint.scheme_for(prefix) is not None:
                raise SvskFormatError(
                    f"{prefix}: quantised output heads are not served. Quantise the model with --ignore {prefix}."
                )
            return None
        if not isinstance(layer, LinearBase):
            return None
        parts = self._parts(prefix)
        schemes = {name: self.checkpoint.scheme_for(name) for name in parts}
        chosen: list[ConfigGroup] = [scheme for scheme in schemes.values() if scheme is not None]
        if not chosen:
            return UnquantizedLinearMethod()
        if len(chosen) < len(parts):
            left_out = [name for name, scheme in schemes.items() if scheme is None]
            raise SvskFormatError(
                f"{prefix}: vLLM fuses {', '.join(parts)}, but {', '.join(left_out)} is not quantised. Ignore all of "
                "them or none when quantising."
            )
        return SvskLinearMethod(prefix, parts, chosen)

    def _parts(self, prefix: str) -> list[str]:
        """Names of the checkpoint's linears that vLLM fuses into the layer ``prefix``."""
        parent, _, last = prefix.rpartition(".")
        shards = self.packed_modules_mapping.get(last, [last])
        return [f"{parent}.{shard}" if parent else shard for shard in shards]
