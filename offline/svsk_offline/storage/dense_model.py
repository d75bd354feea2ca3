# SPDX-License-Identifier: Apache-2.0
"""A dense Hugging Face model on disk, of which only the parts in use are in memory."""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svsk_kernels.errors import SvskError, one_line
from svsk_offline.storage.decoder_blocks import decoder_blocks, linear_modules
from svsk_offline.storage.fold import Fold
from svsk_offline.storage.model_identity import content_digest, folder_identity
from svsk_offline.storage.model_loading import build_skeleton, own_code_refused
from svsk_offline.storage.module_weights import drop, fill, kept_in_float32
from svsk_offline.storage.tensor_names import TensorMap, require_complete
from svsk_offline.storage.tensor_readers import FoldedTensors, RestoredTensors, TensorReader
from svsk_vllm.architecture.experts import separate_experts
from svsk_vllm.format import Checkpoint, ShardedReader
from svsk_vllm.format.model_config import undeclared
from svsk_vllm.format.shards import read_json

__all__ = ["ModelSource"]


class ModelSource:
    """A dense model folder.

    Configuration, tokenizer, a skeleton without weights, and weights by name.

    There are two kinds of names. Modules, parameters and buffers are named as in transformers'
    class; tensors, and quantised linears with them, are named as in the folder, which is not always
    the same. :attr:`map` goes from one to the other.

    Args:
        folder: a Hugging Face folder with safetensors.
        trust_remote_code: run Python files that come with the model.
        restored: it is an SVSK checkpoint; the model is the one that it stands for.

    Attributes:
        tensors: reads weights; what it reads is the model, folded where it is.
        fold: by what they are multiplied; None where they are read as they are.

    Raises:
        SvskError: the model is quantised already, or its architecture is not supported.
        SvskFormatError: the folder is damaged.
    """

    def __init__(
        self, folder: Path, *, trust_remote_code: bool = False, restored: bool = False
    ) -> None:
        self.folder, self.trust_remote_code = folder, trust_remote_code
        self.config_dict: dict[str, Any] = read_json(folder / "config.json")
        if restored:
            self.config_dict = undeclared(self.config_dict)
        declared = self.config_dict.pop("quantization_config", None)  # null says that there is none
        if declared is not None:
            method = declared.get("quant_method") if isinstance(declared, dict) else declared
            raise SvskError(
                f"{folder}: is quantised already ({method}). Start from the unquantised model."
            )
        if self.config_dict.get("transformers_weights") is not None:
            raise SvskError(
                f"{folder}: config.json names {self.config_dict['transformers_weights']} as the"
                " weights to load. Supported are model.safetensors and"
                " model.safetensors.index.json: save the model again without it."
            )
        self._stored: TensorReader = (
            RestoredTensors(Checkpoint(folder))
            if restored
            else ShardedReader(folder, by_headers=True)
        )
        self.tensors: TensorReader = self._stored
        self.fold: Fold | None = None

    def folded(self, fold: Fold) -> "ModelSource":
        """The same model with its weights multiplied as they are read; everything else is shared.

        Weights that are loaded into :attr:`model` are those of the source that loaded them.
        """
        other = copy.copy(self)
        other.tensors, other.fold = FoldedTensors(self._stored, fold), fold
        vars(other).pop("content_sample", None)
        return other

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        try:
            with own_code_refused(self.folder):
                return AutoTokenizer.from_pretrained(
                    self.folder, trust_remote_code=self.trust_remote_code
                )
        except (OSError, ValueError) as error:
            raise SvskError(
                f"{self.folder}: has no usable tokenizer ({one_line(error)[:300]}). Copy the"
                " tokenizer's files of the original model there."
            ) from error

    @property
    def special_tokens(self) -> frozenset[int]:
        """Numbers of the tokenizer's special tokens, and of those that end what is generated."""
        generation = self.folder / "generation_config.json"
        ends = [self.config_dict, read_json(generation) if generation.exists() else {}]
        found = {*self.tokenizer.all_special_ids}
        for end in (config.get("eos_token_id") for config in ends):
            found.update(end if isinstance(end, list) else [end])
        return frozenset(token for token in found if isinstance(token, int))

    def identity(self) -> dict[str, Any]:
        """What tells one model from another without reading its weights; JSON values.

        Its own Python files are part of it where they are run.
        """
        folded = {} if self.fold is None else {"fold": self.fold.digest}
        return folded | folder_identity(
            self.folder, self.config_dict, self._stored, code=self.trust_remote_code
        )

    @cached_property
    def content_sample(self) -> str:
        """Digest of config.json, of a piece of every tensor, and of what these are multiplied by.

        It tells models apart that differ in their weights alone, without reading them all, and does
        not depend on where the folder lies or when it was copied.
        """
        return content_digest(
            self.config_dict, self._stored, "" if self.fold is None else self.fold.digest
        )

    @cached_property
    def model(self) -> nn.Module:
        """The causal language model with parameters on the meta device and real buffers.

        Experts that are stored one by one are modules of their own.
        """
        model = build_skeleton(self.folder, trust_remote_code=self.trust_remote_code)
        separate_experts(model, self.tensors.names)
        return model

    @cached_property
    def map(self) -> TensorMap:
        """Which stored tensor fills which parameter.

        Raises:
            SvskError: the folder lacks a tensor that the model needs or holds it in another shape,
                holds one that the model class does not know, or two for one parameter.
            SvskFormatError: a shard is damaged.
        """
        tensor_map = TensorMap(self.folder, self.model, self.tensors.names, self._equal)
        require_complete(tensor_map, self.folder, self.model, self.tensors.describe)
        return tensor_map

    def check(self) -> None:
        """Refuse what cannot be quantised before any work is done on it.

        Raises:
            SvskError: as :attr:`map` and :attr:`blocks`.
        """
        self.blocks  # noqa: B018 - says first what kind of model it is
        self.map  # noqa: B018

    def _equal(self, left: str, right: str) -> bool:
        """Whether two stored tensors hold the same values."""
        if self.tensors.describe(left) != self.tensors.describe(right):
            return False
        return torch.equal(self.tensors.read(left), self.tensors.read(right))

    def linears(self, index: int) -> Iterator[tuple[str, str, nn.Linear]]:
        """The ``nn.Linear`` layers of a decoder block.

        Name below the block, name in the folder, module.

        One whose weight transformers makes out of other tensors when it loads has the model class's
        name.
        """
        name, blocks = self.blocks
        for key, module in linear_modules(blocks[index]):
            yield key, self.stored_module(f"{name}.{index}.{key}"), module

    def block_linears(self) -> dict[str, nn.Linear]:
        """The linears of all decoder blocks by their names in the folder."""
        blocks = range(len(self.blocks[1]))
        return {full: linear for index in blocks for _, full, linear in self.linears(index)}

    def linear_names(self) -> list[str]:
        """Names of all linears, those outside the decoder blocks too."""
        return [*self.block_linears(), *self.other_linears()]

    def stored_module(self, module: str) -> str:
        """Name in the folder of a linear of the model class."""
        return self.map.stored_module(module) or module

    def check_quantizable(self, linear: str) -> None:
        """Refuse a linear whose weight is no tensor of the folder.

        Args:
            linear: name as :meth:`linears` gives it.

        Raises:
            SvskError: transformers makes the weight out of other tensors, or uses it in two places.
        """
        users = self._users.get(f"{linear}.weight", [])
        if len(users) > 1:
            raise SvskError(
                f"{self.folder}: {' and '.join(users)} are one matrix, which cannot be quantised."
                " Add it to --ignore."
            )
        if f"{linear}.weight" not in self.tensors:
            inputs = ", ".join(self.map.inputs_of(f"{linear}.weight"))
            raise SvskError(
                f"{self.folder}: {linear}.weight is made from {inputs} when transformers loads the"
                " model; only what is stored as one matrix can be quantised. Add it to --ignore."
            )

    @cached_property
    def _users(self) -> dict[str, list[str]]:
        """Parameters that each stored tensor fills as it is."""
        users: dict[str, list[str]] = {}
        for name, stored in self.map.sources.items():
            users.setdefault(stored, []).append(name)
        return users

    def block_tensors(self, index: int) -> list[str]:
        """Stored tensors that fill a decoder block."""
        prefix = f"{self.blocks[0]}.{index}."
        return [
            name
            for name in self.tensors.names
            if any(to.startswith(prefix) for to in self.map.targets(name))
        ]

    def outside_tensors(self) -> list[str]:
        """Stored tensors that belong into a checkpoint and fill no decoder block."""
        prefix = f"{self.blocks[0]}."
        spare = set(self.map.spare)
        return [
            name
            for name in self.tensors.names
            if name in spare or any(not to.startswith(prefix) for to in self.map.targets(name))
        ]

    def other_linears(self) -> list[str]:
        """Names, in folder and model class, of what may be a linear outside the decoder blocks."""
        prefix = f"{self.blocks[0]}."
        names = [name for name, _ in linear_modules(self.model) if not name.startswith(prefix)]
        spare = [
            name.removesuffix(".weight")
            for name in self.map.spare
            if name.endswith(".weight") and len(self.tensors.describe(name).shape) == 2
        ]
        return list(dict.fromkeys([*names, *(self.stored_module(name) for name in names), *spare]))

    def output_config(self, *, untied: bool = False) -> dict[str, Any]:
        """config.json for these tensors: it does not tie what the stored values do not.

        Args:
            untied: embedding and head are stored apart although the model ties them.
        """
        if not self.map.untied and not untied:
            return self.config_dict
        config = {**self.config_dict, "tie_word_embeddings": False}
        if isinstance(text := config.get("text_config"), dict):
            config["text_config"] = {**text, "tie_word_embeddings": False}
        return config

    @cached_property
    def native_dtype(self) -> torch.dtype:
        """The model's own dtype: what config.json declares, or else that of most stored values."""
        text = self.config_dict.get("text_config")
        for part in (self.config_dict, text if isinstance(text, dict) else {}):
            declared = getattr(torch, str(part.get("dtype") or part.get("torch_dtype")), None)
            if isinstance(declared, torch.dtype):
                return declared
        sizes: Counter[torch.dtype] = Counter()
        for spec in map(self.tensors.describe, self.tensors.names):
            sizes[spec.dtype] += spec.num_bits
        return sizes.most_common(1)[0][0]

    @cached_property
    def blocks(self) -> tuple[str, nn.ModuleList]:
        """Name and modules of the decoder blocks, see :func:`decoder_blocks`."""
        return decoder_blocks(self.model, self.folder)

    def load(
        self, module: nn.Module, prefix: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Fill the parameters and persistent buffers of ``module`` from the folder.

        Args:
            module: part of :attr:`model`.
            prefix: its name, followed by a dot unless empty.
            dtype: floating dtype of the loaded parameters, but for those that the model class keeps
                in float32.
            device: where to put them.

        Raises:
            SvskError: the folder lacks a tensor or holds it in another shape.
        """
        self._fill(module, prefix, list(module.state_dict()), dtype, device)

    def _fill(
        self,
        module: nn.Module,
        prefix: str,
        names: Iterable[str],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Fill parameters and buffers of ``module`` by name."""
        keep = self._kept_in_float32
        fill(module, prefix, names, self.map, self.tensors.read, dtype, keep, device)

    @cached_property
    def _kept_in_float32(self) -> re.Pattern[str] | None:
        return kept_in_float32(self.model)

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
    def loaded_outside(
        self, dtype: torch.dtype, device: torch.device, *, head: bool = True
    ) -> Iterator[None]:
        """All weights of the model, those of the decoder blocks left out.

        Args:
            dtype: floating dtype of the loaded parameters.
            device: where to put them.
            head: load the output head as well.

        Raises:
            SvskError: as :meth:`load`.
        """
        model: Any = self.model
        output = None if head else model.get_output_embeddings()
        unwanted = output is not None and output is not model.get_input_embeddings()
        heads = [
            f"{name}." for name, module in model.named_modules() if unwanted and module is output
        ]
        skipped = (f"{self.blocks[0]}.", *heads)
        names = [name for name in model.state_dict() if not name.startswith(skipped)]
        self._fill(model, "", names, dtype, device)
        try:
            yield
        finally:
            self.unload(model)

    @staticmethod
    def unload(module: nn.Module) -> None:
        """Drop the weights that :meth:`load` filled; buffers, held by nothing else, stay."""
        drop(module)

    def model_dtype(self, requested: str) -> torch.dtype:
        """Dtype of the checkpoint's scales and unquantised tensors.

        Args:
            requested: ``auto`` (the model's own; bfloat16 for float32 models), ``bfloat16`` or
                ``float16``.
        """
        dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        if requested == "auto":
            return self.native_dtype if self.native_dtype in dtypes.values() else torch.bfloat16
        if requested not in dtypes:
            raise SvskError(f"--dtype {requested}: expected auto, bfloat16 or float16.")
        return dtypes[requested]
