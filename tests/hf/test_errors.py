# SPDX-License-Identifier: Apache-2.0
"""What transformers must not load silently wrong.

Every damage and contradiction is an error that names the tensor.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, Qwen2ForCausalLM

from svsk_vllm.format import SvskFormatError
from svsk_vllm.hf.matching import open_checkpoint
from svsk_vllm.hf.quantizer import SvskHfConfig
from tests.hf.loading import Q_PROJ, Folders, MakeFolders, Tensors, load
from tests.support.format_builders import edit_tensors
from tests.support.tiny_models import Family, scheme, write_dense, write_random_svsk


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config["quantization_config"])
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    "suffix", ["weight_packed", "weight_scale", "sidecar_u", "sidecar_v", "sidecar_gain", "bias"]
)
def test_missing_tensor(broken: Path, suffix: str) -> None:
    edit_tensors(broken, lambda tensors: tensors.pop(f"{Q_PROJ}.{suffix}"))
    with pytest.raises(SvskFormatError, match=rf"{Q_PROJ}\.{suffix}"):
        load(broken)


def test_missing_linear(broken: Path) -> None:
    def remove(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{Q_PROJ}.")]:
            del tensors[name]

    edit_tensors(broken, remove)
    with pytest.raises(SvskFormatError, match=rf"{Q_PROJ}\.weight: missing"):
        load(broken)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{Q_PROJ}.sidecar_gain", lambda tensor: tensor.half(), "torch.float16"),
        (f"{Q_PROJ}.weight_packed", lambda tensor: tensor.long(), "torch.int64"),
        (f"{Q_PROJ}.weight_packed", lambda tensor: tensor.flatten(), "expected a matrix"),
        (f"{Q_PROJ}.sidecar_u", lambda tensor: tensor[:, :, :2].contiguous(), r"\[128, 2, 2\]"),
        (
            "model.norm.weight",
            lambda tensor: tensor[:64].contiguous(),
            r"\[64\], the architecture expects \[128\]",
        ),
    ],
)
def test_wrong_tensor(
    broken: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    edit_tensors(broken, lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(SvskFormatError, match=rf"{name}.*{message}"):
        load(broken)


def test_linear_of_another_shape(folders: MakeFolders, broken: Path) -> None:
    other = load_file(folders("mistral", torch.bfloat16).svsk / "model.safetensors")
    edit_tensors(
        broken,
        lambda tensors: tensors.update({k: v for k, v in other.items() if k.startswith(Q_PROJ)}),
    )
    with pytest.raises(
        SvskFormatError, match=r"q_proj\.weight_packed: holds \[128, 192\], .* expects \[128, 128\]"
    ):
        load(broken)


def test_linear_stored_both_ways(broken: Path) -> None:
    edit_tensors(
        broken, lambda tensors: tensors.update({f"{Q_PROJ}.weight": torch.zeros(128, 128)})
    )
    with pytest.raises(SvskFormatError, match=rf"{Q_PROJ}: stored both dense"):
        load(broken)


def test_weights_of_another_kind(broken: Path) -> None:
    """As with ``use_safetensors=False``."""
    with pytest.raises(
        SvskFormatError, match=r"model\.bin: an SVSK checkpoint consists of \.safetensors files"
    ):
        open_checkpoint([str(broken / "model.safetensors"), str(broken / "model.bin")])


def test_targeted_head_stored_dense(broken: Path) -> None:
    edit_config(broken, lambda config: config.update(ignore=[]))
    with pytest.raises(SvskFormatError, match=r"lm_head\.weight: stored as it was, .* ignore list"):
        load(broken)


def test_quantized_head_of_a_tied_model(folders: MakeFolders, tmp_path: Path) -> None:
    dense = Path(shutil.copytree(folders("llama", torch.bfloat16).dense, tmp_path / "dense"))
    edit_tensors(
        dense,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        ),
    )
    svsk = write_random_svsk(
        dense, tmp_path / "svsk", linears=["lm_head"], schemes={"one": scheme("lm_head")}, ignore=()
    )
    with pytest.raises(
        SvskFormatError,
        match=r"lm_head: stored quantised, and model\.embed_tokens\.weight, to which",
    ):
        load(svsk)


def test_ignored_linear_stored_quantized(broken: Path) -> None:
    edit_config(broken, lambda config: config.update(ignore=["lm_head", Q_PROJ]))
    with pytest.raises(
        SvskFormatError, match=rf"{Q_PROJ}: stored quantised, but is on the ignore list"
    ):
        load(broken)


def test_config_of_a_dense_folder(qwen2: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen2.restored, tmp_path / "restored"))
    shutil.copyfile(qwen2.svsk / "config.json", folder / "config.json")
    with pytest.raises(SvskFormatError, match="no quantised linear, although"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": "2.0"}, "format version 2.0 is not readable"), ({"color": "red"}, "color")],
)
def test_config_this_package_does_not_read(
    broken: Path, change: dict[str, str], message: str
) -> None:
    edit_config(broken, lambda config: config.update(change))
    with pytest.raises(SvskFormatError, match=message):
        load(broken)


def test_weight_that_is_not_a_linears(tmp_path: Path) -> None:
    # GPT-2 keeps its weights transposed, in a class of its own.
    dense = write_dense(tmp_path / "dense", Family("gpt2"))
    name = "transformer.h.0.attn.c_attn"
    svsk = write_random_svsk(
        dense, tmp_path / "svsk", linears=[name], schemes={"one": scheme(name)}
    )
    with pytest.raises(SvskFormatError, match=rf"{name}: stored quantised, .* Conv1D"):
        load(svsk)


def test_weights_that_are_not_in_files(qwen2: Folders) -> None:
    with pytest.raises(SvskFormatError, match="loaded from its files"):
        Qwen2ForCausalLM.from_pretrained(
            None, config=AutoConfig.from_pretrained(qwen2.svsk), state_dict={}
        )


def test_tensors_that_the_caller_renames_to_another_linear(qwen2: Folders) -> None:
    with pytest.raises(
        SvskFormatError, match=rf"{Q_PROJ}\.weight.* not loaded by this version .* `key_mapping`"
    ):
        load(qwen2.svsk, key_mapping={"q_proj": "k_proj"})


def test_tensors_that_the_caller_renames_to_nothing(qwen2: Folders) -> None:
    with pytest.raises(
        SvskFormatError, match=rf"{Q_PROJ}\.weight.* not loaded by this version .* `key_mapping`"
    ):
        load(qwen2.svsk, key_mapping={"q_proj": "z_proj"})


def test_dense_model_with_an_svsk_config(qwen2: Folders) -> None:
    config = SvskHfConfig(**AutoConfig.from_pretrained(qwen2.svsk).quantization_config)
    with pytest.raises(
        SvskFormatError, match=r"transformers cannot quantise a model to SVSK. Run `svsk quantize`"
    ):
        load(qwen2.dense, quantization_config=config)
