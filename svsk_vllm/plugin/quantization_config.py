# SPDX-License-Identifier: Apache-2.0
"""What vLLM asks a quantisation method: which layers, and by which method."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from svsk_vllm.architecture.folder_check import require_sound
from svsk_vllm.format import (
    SUFFIXES,
    ConfigGroup,
    LinearSpec,
    SvskCheckpointConfig,
    SvskFormatError,
)
from svsk_vllm.format.group_scales import ONE_LEVEL
from svsk_vllm.format.quantized_linear import tensor_problems
from svsk_vllm.format.row_order import ROW_ORDERS, row_order_problem
from svsk_vllm.format.suffixes import WEIGHT_PACKED, WEIGHT_ROW_SCALE, WEIGHT_SCALE
from svsk_vllm.plugin.arrival import LinearRecord, ShardId, expect, record_loads
from svsk_vllm.plugin.linear_method import PARAMETERS, Origin, SvskLinearMethod
from svsk_vllm.plugin.row_order import stored_row_order
from svsk_vllm.plugin.stored_names import (
    Rename,
    StoredModules,
    read_headers,
    stored_dense,
    stored_twice,
)
from svsk_vllm.plugin.table_choice import table_method

__all__ = ["SvskConfig"]

_RANKS_STATE = re.compile(r"model-rank-\d+-part-")
_MADE_UP = ("dummy",)
"""Load formats that read no weights."""
_STATES = ("sharded_state", "runai_streamer_sharded")
"""Load formats that read what vLLM saved, not checkpoints."""
_USUAL_PARTS = {
    QKVParallelLinear: ("q_proj", "k_proj", "v_proj"),
    MergedColumnParallelLinear: ("gate_proj", "up_proj"),
}
"""Of fused layers whose model class does not name them."""


class SvskConfig(QuantizationConfig):
    """vLLM's view of the ``quantization_config`` of an SVSK checkpoint.

    Args:
        checkpoint: the checked configuration. vLLM leaves it out where config.json has none.

    Raises:
        SvskFormatError: without a configuration.
    """

    def __init__(self, checkpoint: SvskCheckpointConfig | None = None) -> None:
        super().__init__()
        if checkpoint is None:
            raise SvskFormatError(
                "--quantization svsk: the model's config.json has no quantization_config, so its"
                " weights are not quantised. Run `svsk quantize MODEL OUT` and serve OUT, or leave"
                " --quantization out."
            )
        self.checkpoint = checkpoint
        self._renames: list[Rename] = []
        self._model: str | None = None
        self._revision: str | None = None
        self._hf_config: Any = None
        self._stored: StoredModules | None = None

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
        """Claim checkpoints of this format.

        Raises:
            SvskFormatError: the user asks for another method.
        """
        if hf_quant_cfg.get("quant_method") != "svsk":
            return None
        if user_quant not in (None, "svsk"):
            raise SvskFormatError(
                f"--quantization {user_quant}: the checkpoint is quantised by svsk already. Leave"
                " the option out or say --quantization svsk, or serve the dense model with"
                f" --quantization {user_quant}."
            )
        return "svsk"

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Refuse a folder that `svsk validate` would refuse, before vLLM builds its model.

        Of a model from the hub nothing but config.json is here yet, and a folder of config.json
        alone is loaded with random weights. What a sharded-state folder holds are parameters of
        vLLM's own.

        Raises:
            SvskFormatError: names what is wrong.
        """
        self._model, self._hf_config, self._revision = model_name, hf_config, revision
        folder = Path(model_name)
        if folder.is_dir() and any(
            not _RANKS_STATE.match(path.name) for path in folder.glob("*.safetensors")
        ):
            require_sound(folder, hf_config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Translate module names of the checkpoint to those of the vLLM model."""
        self._renames.append(hf_to_vllm_mapper.apply_list)
        self._stored = None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Method for one layer.

        Raises:
            SvskFormatError: parts of a fused layer disagree, tensors are missing, or the layer is
                quantised in a way that is not served.
        """
        load_format = str(get_current_vllm_config().load_config.load_format)
        if load_format in _STATES:
            raise SvskFormatError(
                f"--load-format {load_format} reads states that vLLM saved, which it cannot do for"
                " svsk. Serve the checkpoint itself, without --load-format."
            )
        counted = load_format not in _MADE_UP
        if isinstance(layer, VocabParallelEmbedding):
            return table_method(self, layer, prefix, counted=counted)
        if not isinstance(layer, LinearBase):
            return self._experts_method(layer, prefix, counted=counted)
        parts = self._parts(layer, prefix)
        schemes = {name: self.scheme(name) for name in parts}
        chosen: list[ConfigGroup] = [scheme for scheme in schemes.values() if scheme is not None]
        record_loads(layer)
        if not chosen:
            expect(layer, LinearRecord(_shards(layer), counted=counted))
            return UnquantizedLinearMethod()
        if len(chosen) < len(parts):
            left_out = [name for name, scheme in schemes.items() if scheme is None]
            raise SvskFormatError(
                f"{prefix}: vLLM fuses {', '.join(parts)}, but {', '.join(left_out)} is not"
                " quantised. Ignore all of them or none when quantising."
            )
        if hot := next(
            (name for name, one in schemes.items() if one and one.weights.hot_rows), None
        ):
            raise SvskFormatError(
                f"{hot}: config.json gives it hot_rows, which only embeddings and output heads"
                " have. Correct it."
            )
        expect(layer, LinearRecord(_shards(layer), PARAMETERS, counted))
        return SvskLinearMethod(prefix, parts, chosen, self._origin(parts, chosen, counted=counted))

    @property
    def stored(self) -> StoredModules:
        """The stored modules; none are known where no safetensors can be looked into."""
        if self._stored is None:
            readable = (
                self._model is not None
                and str(get_current_vllm_config().load_config.load_format) not in _MADE_UP
            )
            tensors = read_headers(str(self._model), self._revision) if readable else {}
            self._stored = StoredModules(tensors, self._renames)
        return self._stored

    def _experts_method(
        self, layer: torch.nn.Module, prefix: str, *, counted: bool
    ) -> QuantizeMethodBase | None:
        """Method for a layer's routed experts; None for those stored as they were, and others."""
        if not any(
            "Experts" in cls.__name__ or "FusedMoE" in cls.__name__ for cls in type(layer).__mro__
        ):
            return None
        below = self.stored.below(prefix)
        if below and not any(self.stored.suffixes(name) & set(SUFFIXES) for name in below):
            return None
        # Here, for it imports what only mixtures of experts need.
        from svsk_vllm.plugin.experts_choice import experts_method

        return experts_method(self, layer, prefix, counted=counted)

    def _parts(self, layer: torch.nn.Module, prefix: str) -> list[str]:
        """Names in vLLM's model of the checkpoint's linears that make up the layer ``prefix``."""
        parent, _, last = prefix.rpartition(".")

        def beside(names: tuple[str, ...] | list[str]) -> list[str]:
            return [f"{parent}.{name}" if parent else name for name in names]

        if last in self.packed_modules_mapping:
            parts = beside(self.packed_modules_mapping[last])
            # What vLLM fuses may be stored fused, as GLM-4's gate_up_proj.
            fused = (
                len(parts) > 1
                and not any(map(self.stored.find, parts))
                and self.stored.find(prefix)
            )
            return [prefix] if fused else parts
        if not self.stored.find(prefix):
            for kind, usual in _USUAL_PARTS.items():
                if isinstance(layer, kind) and all(map(self.stored.find, parts := beside(usual))):
                    return parts
        return [prefix]

    def scheme(self, name: str) -> ConfigGroup | None:
        """The scheme of a linear of vLLM's model, by its stored name where it has one.

        A linear that only a class name targets and that is stored as it was is not quantised: vLLM
        has linears where transformers has other modules.
        """
        stored = self.stored.find(name)
        if stored is None:
            return self.renamed().scheme_for(self._from_siblings(name))
        scheme = self.checkpoint.scheme_for(stored)
        held = self.stored.suffixes(stored)
        if "weight" in held and held & set(SUFFIXES):
            raise stored_twice(stored)
        if held & set(SUFFIXES):
            if scheme is None:
                raise SvskFormatError(
                    f"{stored}: stored quantised, but config.json does not quantise it. Correct the"
                    " config."
                )
        elif "weight" in held and scheme is not None:
            if self.checkpoint.scheme_for(stored, by_class=False) is not None:
                raise stored_dense(stored)
            return None
        return scheme

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a linear of vLLM's model."""
        return self.stored.find(name) or self._from_siblings(name)

    def _from_siblings(self, name: str) -> str:
        """The name that a linear without stored tensors would have beside others of its parent."""
        parent, _, last = name.rpartition(".")
        if not parent or not self.stored.tensors:
            return name
        parents = {
            child.rpartition(".")[0] for child in self.stored.below(parent) if child.count(".")
        }
        return f"{next(iter(parents))}.{last}" if len(parents) == 1 else name

    def renamed(self) -> SvskCheckpointConfig:
        """The configuration with vLLM's names, for layers of which nothing is stored."""
        if self.stored.tensors:
            return self.checkpoint
        renamed = self.checkpoint
        for rename in self._renames:
            renamed = renamed.rename(partial(_rename_entries, rename))
        return renamed

    def _origin(self, parts: list[str], schemes: list[ConfigGroup], *, counted: bool) -> Origin:
        architectures, hf_config = self._architectures()
        names = tuple(map(self.stored_name, parts))
        for name, scheme in zip(names, schemes, strict=True):
            if problem := row_order_problem(
                architectures, name, scheme.sidecar.rank, own_class=True
            ):
                raise SvskFormatError(problem)
        moved = next((arch for arch in architectures if arch in ROW_ORDERS), None)
        return Origin(
            names,
            self.stored_specs(names, schemes),
            partial(stored_row_order, moved or "", hf_config, names[0]),
            known_order=moved is None or ROW_ORDERS[moved].served == "any rank",
            counted=counted,
        )

    def _architectures(self) -> tuple[list[str], Any]:
        """Names of the model's architecture in vLLM's own models, and its configuration."""
        model_config: Any = get_current_vllm_config().model_config
        hf_config = self._hf_config or getattr(model_config, "hf_config", None)
        if model_config is not None and model_config.using_transformers_backend():
            return [], hf_config  # loads what is stored
        return list(getattr(hf_config, "architectures", None) or ()), hf_config

    def stored_specs(
        self, names: tuple[str, ...], schemes: list[ConfigGroup]
    ) -> tuple[LinearSpec, ...] | None:
        """Specifications of the stored parts, from the headers.

        Raises:
            SvskFormatError: a tensor is missing, or has another dtype or shape than the scheme asks
                for.
        """
        tensors = self.stored.tensors
        if not any(f"{name}.{suffix}" in tensors for name in names for suffix in SUFFIXES):
            return None  # by other names than vLLM's: what arrives is counted
        specs = []
        for name, scheme in zip(names, schemes, strict=True):
            held = {
                suffix: tensors[stored]
                for suffix in SUFFIXES
                if (stored := f"{name}.{suffix}") in tensors
            }
            one_level = scheme.weights.scale_bits == ONE_LEVEL
            floating = WEIGHT_SCALE if one_level else WEIGHT_ROW_SCALE
            for suffix in (WEIGHT_PACKED, floating):
                if suffix not in held or len(held[suffix].shape) != 2:
                    raise SvskFormatError(
                        f"{name}.{suffix}: missing or no matrix. The checkpoint is incomplete: copy"
                        " or download the folder again; `svsk validate` lists what is missing."
                    )
            rows, columns = scheme.weights.shape_of(held[WEIGHT_PACKED].shape)
            spec = LinearSpec(name, rows, columns, scheme, held[floating].dtype)
            if problems := tensor_problems(spec, held):
                raise SvskFormatError(
                    f"{problems[0]}. Copy or download the folder again; `svsk validate` lists what"
                    " is wrong."
                )
            specs.append(spec)
        return tuple(specs)


def _rename_entries(rename: Rename, entries: list[str]) -> list[str]:
    """Translate exact names.

    vLLM's rules for prefixes end with a dot, so a name is given one to go on with.
    """
    renamed = []
    for entry in entries:
        if entry.startswith("re:"):
            renamed.append(entry)  # a pattern is no name
            continue
        longer = next(iter(rename([f"{entry}.weight"])), "")
        renamed.append(longer.removesuffix(".weight") if longer.endswith(".weight") else entry)
    return renamed


def _shards(layer: torch.nn.Module) -> tuple[ShardId, ...]:
    """The shard ids that vLLM loads the parts of a linear with."""
    if isinstance(layer, QKVParallelLinear):
        return ("q", "k", "v")
    return (
        tuple(range(len(layer.output_sizes)))
        if isinstance(layer, MergedColumnParallelLinear)
        else (None,)
    )
