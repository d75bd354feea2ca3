# SPDX-License-Identifier: Apache-2.0
"""A dense Hugging Face model on disk, of which only the parts in use are in memory."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svsk_offline.errors import SvskError
from svsk_vllm.format import ShardedReader
from svsk_vllm.format.shards import read_json

__all__ = ["ModelSource", "linear_modules", "resolve_model"]

_WANTED_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "tokenizer*", "LICENSE*", "NOTICE*", "*.md")
_SAMPLE = 1024
"""Values of each tensor that tell its content from another's."""


def resolve_model(model: str) -> Path:
    """Folder of a model given as a folder or a hub name.

    Raises:
        SvskError: neither a folder nor something the hub, or its local cache, has.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise SvskError(f"{model}: no such folder.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(_WANTED_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SvskError(f"{model}: not a folder, and the hub did not give it ({error}).") from error


class ModelSource:
    """A dense model folder: configuration, tokenizer, a skeleton without weights, and weights by name.

    Args:
        folder: a Hugging Face folder with safetensors.

    Raises:
        SvskError: the model is quantised already, or its architecture is not supported.
        SvskFormatError: the folder is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_dict: dict[str, Any] = read_json(folder / "config.json")
        if "quantization_config" in self.config_dict:
            method = self.config_dict["quantization_config"].get("quant_method")
            raise SvskError(f"{folder}: is quantised already ({method}). Start from the unquantised model.")
        self.tensors = ShardedReader(folder)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise SvskError(f"{self.folder}: no usable tokenizer ({error}).") from error

    def identity(self) -> dict[str, Any]:
        """What tells one model from another without reading its weights; JSON values."""
        shards = [[name, self.tensors.shard_of(name)] for name in self.tensors.names]
        files = ((path.name, path.stat()) for path in sorted(self.folder.glob("*.safetensors")))
        return {
            "model": hashlib.sha256(json.dumps([self.config_dict, shards], sort_keys=True).encode()).hexdigest(),
            "files": [[name, found.st_size, found.st_mtime_ns] for name, found in files],
        }

    def content_sample(self) -> str:
        """Digest of config.json and of a piece from the middle of every tensor.

        It tells models apart that differ in their weights alone, without reading them all, and does not depend on
        where the folder lies or when it was copied.
        """
        digest = hashlib.sha256(json.dumps(self.config_dict, sort_keys=True).encode())
        for name in sorted(self.tensors.names):
            values = self.tensors.read(name).flatten()  # mapped: only the pages of the piece are read
            middle = len(values) // 2
            piece = values[middle : middle + _SAMPLE].clone().view(torch.uint8)
            digest.update(f"{name} {len(values)} {values.dtype} ".encode() + piece.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def model(self) -> nn.Module:
        """The causal language model with parameters on the meta device and real buffers."""
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(self.folder)
            with init_empty_weights(include_buffers=False):
                model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except ValueError as error:
            raise SvskError(f"{self.folder}: not a causal language model transformers knows ({error}).") from error
        model.tie_weights()
        module: nn.Module = model.eval().requires_grad_(False)
        return module

    @cached_property
    def _own_names(self) -> set[str]:
        """Parameters, tied ones once, and persistent buffers."""
        stored = set(self.model.state_dict())  # lists tied parameters under each of their names
        own = {name for name, _ in self.model.named_parameters()} | {name for name, _ in self.model.named_buffers()}
        return stored & own

    def is_stored(self, name: str) -> bool:
        """Whether a tensor of the folder belongs into a checkpoint; a tied one's second copy and old tables do not.

        Raises:
            SvskError: the model class has no such tensor.
        """
        if name in self._own_names:
            return True
        if name in self.model.state_dict() or name.endswith(("rotary_emb.inv_freq", ".masked_bias", ".attn.bias")):
            return False
        raise SvskError(
            f"{self.folder}: {type(self.model).__name__} has no tensor {name}. Models whose stored names differ from "
            "transformers' are not supported; load the model and save it again with save_pretrained()."
        )

    @cached_property
    def native_dtype(self) -> torch.dtype:
        """The model's own dtype: what config.json declares, or else that of most stored values."""
        declared = getattr(torch, str(self.config_dict.get("dtype") or self.config_dict.get("torch_dtype")), None)
        if isinstance(declared, torch.dtype):
            return declared
        sizes: dict[torch.dtype, int] = {}
        for name in self.tensors.names:
            spec = self.tensors.describe(name)
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.num_bits
        return max(sizes, key=lambda dtype: sizes[dtype])

    @cached_property
    def blocks(self) -> tuple[str, nn.ModuleList]:
        """Name and modules of the decoder blocks.

        Raises:
            SvskError: there is no module list of ``num_hidden_layers`` blocks holding ``nn.Linear``.
        """
        config: Any = self.model.config
        count = config.get_text_config().num_hidden_layers
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == count and list(linear_modules(module[0])):
                experts = [key for key, value in module.named_parameters() if value.ndim > 2]
                if experts:
                    raise SvskError(
                        f"{self.folder}: {name}.{experts[0]} is a stack of expert matrices. Mixture-of-experts models "
                        "are not supported."
                    )
                return name, module
        raise SvskError(
            f"{self.folder}: found no list of {count} decoder blocks with nn.Linear layers in "
            f"{type(self.model).__name__}. Supported are Llama, Qwen2, Qwen3, Mistral and models built like them."
        )

    def load(self, module: nn.Module, prefix: str, dtype: torch.dtype, device: torch.device) -> None:
        """Fill the parameters and persistent buffers of ``module`` from the folder.

        Args:
            module: part of :attr:`model`.
            prefix: its name, followed by a dot unless empty.
            dtype: floating dtype of the loaded parameters.
            device: where to put them.

        Raises:
            SvskError: the folder lacks a tensor or holds it in another shape.
        """
        state = {name: self._read(prefix + name, want, dtype, device) for name, want in module.state_dict().items()}
        module.load_state_dict(state, assign=True)
        module.to(device)  # non-persistent buffers

    def _read(self, name: str, want: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor of the folder in the shape of ``want``, floating ones cast to ``dtype``."""
        if name not in self.tensors:
            raise SvskError(f"{self.folder}: no tensor {name}, which {type(self.model).__name__} needs.")
        tensor = self.tensors.read(name)
        if tensor.shape != want.shape:
            raise SvskError(
                f"{self.folder}: {name} has shape {list(tensor.shape)}, expected {list(want.shape)} by config.json."
            )
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    @contextmanager
    def replaced_blocks(self, stand_ins: Iterable[nn.Module]) -> Iterator[Any]:
        """The model with other modules in place of its decoder blocks."""
        name, blocks = self.blocks
        parent, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(parent), attribute, nn.ModuleList(stand_ins))
        try:
            yield self.model
        finally:
            setattr(self.model.get_submodule(parent), attribute, blocks)

    @contextmanager
    def loaded_outside(self, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
        """While :meth:`replaced_blocks` is in force: all weights of the model, those of the blocks left out.

        Raises:
            SvskError: as :meth:`load`.
        """
        model: Any = self.model
        model.tie_weights()  # loading and unloading the embedding has untied it
        state = {name: self._read(name, parameter, dtype, device) for name, parameter in model.named_parameters()}
        model.load_state_dict(state, assign=True, strict=False)
        model.tie_weights()
        try:
            yield
        finally:
            empty = {name: torch.empty_like(state[name], device="meta") for name in state}
            model.load_state_dict(empty, assign=True, strict=False)
            model.tie_weights()

    @staticmethod
    def unload(module: nn.Module) -> None:
        """Drop the weights of a module that :meth:`load` filled."""
        module.to("meta")

    def model_dtype(self, requested: str) -> torch.dtype:
        """Dtype of the checkpoint's scales and unquantised tensors.

        Args:
            requested: ``auto`` (the model's own; bfloat16 for float32 models), ``bfloat16`` or ``float16``.
        """
        known = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        if requested == "auto":
            return self.native_dtype if self.native_dtype in known.values() else torch.bfloat16
        if requested not in known:
            raise SvskError(f"--dtype {requested}: expected auto, bfloat16 or float16.")
        return known[requested]


def linear_modules(module: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
    """Names and modules of the ``nn.Linear`` layers below ``module``."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear))
