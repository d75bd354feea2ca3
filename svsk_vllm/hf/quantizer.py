# SPDX-License-Identifier: Apache-2.0
"""Loading SVSK checkpoints with transformers, dequantised.

Importing this module registers the quantisation method ``svsk`` with transformers; from then on
``AutoModelForCausalLM.from_pretrained(CHECKPOINT)`` gives the dense model that ``svsk restore``
writes, bit for bit: each weight is ``W_hat``, computed in float32, rounded to the checkpoint's
dtype, then cast to the dtype asked for. It is the reference for quality and for other
implementations, not a way to save memory or time.

No module of the model is replaced. A weight converter collects the stored tensors of each quantised
linear while transformers loads, and yields the ``weight`` of a plain ``torch.nn.Linear`` (of a
``torch.nn.Embedding`` for a quantised table, tied to its head as ever), so device maps, offloading
and ``save_pretrained`` see an ordinary model. What the checkpoint stores is compared with its
config and with the model before anything is loaded, because transformers only warns about weights
that it leaves at random values.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from svsk_vllm.architecture.folder_check import require_sound
from svsk_vllm.architecture.parameter_names import parameter_names
from svsk_vllm.format import (
    LinearSpec,
    QuantizedLinear,
    SvskCheckpointConfig,
    SvskFormatError,
    restored_weight,
)
from svsk_vllm.format.model_config import STOCK_LOADER_KEY
from svsk_vllm.hf.experts import DequantizeExperts, Stacks, expert_converters
from svsk_vllm.hf.matching import (
    SUFFIX_OF_PATTERN,
    USE_RESTORE,
    listed,
    match_model,
    open_checkpoint,
    parameter_dtypes,
)

__all__ = ["SvskHfConfig", "SvskHfQuantizer", "register_with_transformers"]

METHOD: Final = "svsk"


class SvskHfConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of an SVSK checkpoint as transformers holds it while it loads.

    Args:
        **kwargs: the keys of ``quantization_config`` in config.json.

    Raises:
        SvskFormatError: an unknown key, a wrong value, or a version this package does not read.
    """

    def __init__(self, /, **kwargs: Any) -> None:
        self.checkpoint = SvskCheckpointConfig.from_dict(kwargs)
        self.quant_method = METHOD
        # Tells transformers to forget this config once the model is loaded: what it holds then is
        # dense.
        self.dequantize = True

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready dictionary of config.json."""
        return self.checkpoint.to_dict()


class SvskHfQuantizer(HfQuantizer):
    """Dequantises the linears of an SVSK checkpoint while transformers loads it.

    Args:
        quantization_config: the checkpoint's config.
        **kwargs: passed on by transformers; ``pre_quantized`` is False for a model that is not an
            SVSK checkpoint.

    Raises:
        SvskFormatError: the model is not an SVSK checkpoint: transformers cannot make one.
    """

    requires_calibration = True

    def __init__(self, quantization_config: SvskHfConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise SvskFormatError(
                "transformers cannot quantise a model to SVSK. Run `svsk quantize` on its folder."
            )
        super().__init__(quantization_config, **kwargs)
        self._dequantize_linear = _DequantizeLinear()
        self._stacks: Stacks = {}
        self._stacked: set[str] = set()
        self._dtypes: dict[str, torch.dtype] = {}
        self._sound = False

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The converter from the stored tensors of a linear to its weight."""
        return [
            WeightConverter(
                list(SUFFIX_OF_PATTERN), [".weight"], operations=[self._dequantize_linear]
            )
        ]

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """transformers' conversions and ours; those of stacks of experts take what we store.

        The first versions of transformers 5 do not ask: they are told that experts are not loaded.
        """
        own = expert_converters(weight_conversions, self._stacks, self._stacked)
        return [*own, *self.get_weight_conversions()]

    def _is_ours(self, converter: Any) -> bool:
        operations = getattr(converter, "operations", ())
        return any(isinstance(one, _DequantizeLinear | DequantizeExperts) for one in operations)

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Dtype to which transformers casts a stored tensor as it reads it.

        None for the stored one, as ours need it.

        Called from transformers 5.21 on. Earlier versions keep the stored dtype of every tensor
        that a converter takes.
        """
        if self._is_ours(converter):
            return None
        inherited: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return inherited

    def update_tp_plan(self, config: Any) -> Any:
        """Called by transformers up to 5.20 before it looks for files: :meth:`_take_config`."""
        return self._take_config(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """Called by later versions of transformers at that place; see :meth:`_take_config`."""
        return self._take_config(config)

    def _take_config(self, config: Any) -> Any:
        """Check the folder, and take the note to other loaders out of the config.

        See ``STOCK_LOADER_NOTE``.

        A quantiser is given the config here before the model is built and before transformers looks
        for the files, which it does by the name in the note. Some versions call both methods.

        Raises:
            SvskFormatError: the checkpoint is not what `svsk validate` calls valid.
        """
        if not self._sound:
            name = getattr(config, "_name_or_path", "")
            # Not a hub id, nor a config that somebody made.
            if name and (Path(name) / "config.json").is_file():
                require_sound(Path(name), config)
            self._sound = True
        if hasattr(config, STOCK_LOADER_KEY):
            delattr(config, STOCK_LOADER_KEY)
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Compare what is stored with the model, and note what each weight is made from.

        Raises:
            SvskFormatError: something is missing, contradicts the config, or does not fit the
                model.
        """
        checkpoint = open_checkpoint(checkpoint_files or [])
        require_sound(checkpoint.folder, model.config)
        names = parameter_names(model, self, checkpoint.tensors.names)
        self._dtypes = parameter_dtypes(model)
        self._dequantize_linear.specs, stacks = match_model(model, checkpoint, names)
        self._stacks.update(stacks)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Leave an ordinary dense model behind.

        Raises:
            SvskFormatError: transformers loaded a weight from something else than its quantised
                form.
        """
        skipped = self._dequantize_linear.specs.keys() - self._dequantize_linear.made
        skipped |= self._stacks.keys() - self._stacked
        if skipped:
            raise SvskFormatError(
                f"{listed(sorted(skipped))}: stored quantised but not loaded by this version of"
                f" transformers, perhaps because of `key_mapping`. {USE_RESTORE}"
            )
        # Saving applies the conversions of loading backwards; ours have no inverse and what is
        # there is dense.
        model._weight_conversions = [
            conversion.operations[0].own if _stacks_experts(conversion) else conversion
            for conversion in getattr(model, "_weight_conversions", None) or []
            if _stacks_experts(conversion) or not self._is_ours(conversion)
        ]
        # With a quantiser, transformers leaves tensors whose name changed in the dtype they are
        # stored in: ours, and dense ones as well (a dropped "model." is enough).
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            dtype = self._dtypes.get(name, tensor.dtype)
            if tensor.dtype != dtype and tensor.device.type != "meta":
                tensor.data = tensor.data.to(dtype)
        return model

    @property
    def is_trainable(self) -> bool:
        """False: training would not keep the weights those of a quantised model."""
        return False

    def is_serializable(self) -> bool:
        """True: ``save_pretrained`` writes a dense folder."""
        return True


class _DequantizeLinear(ConversionOps):
    """From the stored tensors of one linear to its weight.

    Attributes:
        specs: linear by name of the parameter its weight becomes.
        made: parameters made so far.
    """

    def __init__(self) -> None:
        self.specs: dict[str, LinearSpec] = {}
        self.made: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_DequantizeLinear":
        # transformers copies the converter for every tensor of the checkpoint; all of them share
        # this state.
        return self

    def convert(
        self,
        input_dict: Mapping[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Called by transformers with the tensors of one linear by source pattern.

        ``W_hat`` is computed on the CPU whatever the device, so that it does not depend on the
        device.
        """
        spec = self.specs[full_layer_name]
        stored, device = {}, torch.device("cpu")
        for pattern, (tensor, *_) in input_dict.items():
            device = tensor.device
            stored[f"{spec.name}.{SUFFIX_OF_PATTERN[pattern]}"] = tensor.cpu()
        weight = restored_weight(QuantizedLinear.from_tensors(spec, stored))
        self.made.add(full_layer_name)
        # The full name, not the target pattern: transformers would look for the pattern anywhere in
        # the name.
        return {full_layer_name: weight.to(device)}


def _stacks_experts(conversion: Any) -> bool:
    """Whether a conversion is transformers' own of a stack of experts, with ours before it."""
    operations = getattr(conversion, "operations", None) or [None]
    return isinstance(operations[0], DequantizeExperts)


def register_with_transformers() -> None:
    """Register the quantiser and its config with transformers; again, it does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(SvskHfConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(SvskHfQuantizer)


register_with_transformers()
