# SPDX-License-Identifier: Apache-2.0
"""The folder of a model that is named by folder or hub name; what is neither is told at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from svsk_kernels.errors import SvskError, one_line
from svsk_offline.choices import did_you_mean
from svsk_vllm.format.files import read_json

__all__ = ["check_checkpoint", "check_model", "check_on_hub", "resolve_model"]

_WANTED_FILES: Final = tuple(
    """
    *.json *.safetensors *.jinja *.txt *.model *.tiktoken tokenizer* LICENSE* LICENCE* NOTICE*
    *.md USE_POLICY*
    """.split()  # noqa: SIM905 - a literal would take a line for each
)
_UNWANTED_FILES: Final = tuple(
    """
    */*.safetensors */*.json */*.txt */*.model consolidated* adapter_* *.fp16.safetensors
    *.fp16-*.safetensors *.fp32.safetensors *.gguf *.bin *.pth *.pt *.h5 *.msgpack *.onnx
    """.split()  # noqa: SIM905 - a literal would take a line for each
)
"""Copies of the weights for other programs, and folders of other formats."""

_GGUF_MAGIC: Final = b"GGUF"
_GGUF: Final = (
    "a GGUF file, which is not read here. Give the folder, or the hub name, of the original model"
    " with config.json and safetensors; `svsk export --to gguf` writes GGUF."
)
_PARTS: Final = (".json", ".safetensors", ".bin", ".jinja", ".txt", ".model", ".pth", ".pt")
"""Endings of files that a model's folder has."""


def check_model(model: str, *, dense: bool = False) -> None:
    """Refuse a MODEL that is a file, or a folder without a model in it. Reads one small file.

    What is not there may be on the hub, and passes if it can be a name there.

    Args:
        model: folder or hub name.
        dense: a quantised one will not do.

    Raises:
        SvskError: it is a file, a folder without a model, or no folder and no hub's name either.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        _check_folder(path, dense)
    elif path.exists():
        raise SvskError(f"{model}: is {_file(path)}")
    elif model.lower().endswith(".gguf"):
        raise SvskError(f"{model}: no such file; and it names {_GGUF}")
    elif model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise SvskError(f"{model}: no such folder.{_nearest(path)}")


def check_checkpoint(folder: Path) -> None:
    """Refuse a checkpoint to read that is a file, is not there, or is no SVSK checkpoint.

    Raises:
        SvskError: it is.
        SvskFormatError: its config.json is damaged.
    """
    from svsk_vllm.format.contents import parse_quantization_config

    if not folder.exists():
        raise SvskError(f"{folder}: no such folder. Name one that `svsk quantize` wrote.")
    check_model(str(folder))
    parse_quantization_config(folder, read_json(folder / "config.json"))


def resolve_model(model: str, *, trust_remote_code: bool = False) -> Path:
    """Folder of a model given as a folder or a hub name.

    Args:
        model: folder or hub name.
        trust_remote_code: download Python files that come with it, too.

    Raises:
        SvskError: see :func:`check_model`; or the hub, or its local cache, has no such model.
    """
    check_model(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    patterns = [*_WANTED_FILES, *(["*.py"] if trust_remote_code else [])]
    with _hub_says(model):
        return Path(
            snapshot_download(model, allow_patterns=patterns, ignore_patterns=list(_UNWANTED_FILES))
        )


def check_on_hub(model: str) -> None:
    """Refuse a name that neither the hub nor its local cache has as a model; fetches config.json.

    Raises:
        SvskError: it has not.
    """
    from huggingface_hub import hf_hub_download

    with _hub_says(model):
        hf_hub_download(model, "config.json")


@contextmanager
def _hub_says(model: str) -> Iterator[None]:
    """One line for whatever keeps a model from being fetched."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SvskError(
            f"{model}: not a folder here, and the hub did not give it: {_reason(error)}"
            f"{_nearest(Path(model).expanduser())}"
        ) from error


def _check_folder(folder: Path, dense: bool) -> None:
    """Refuse a folder that holds no model."""
    if not (folder / "config.json").exists():
        found = sorted(folder.iterdir())
        if any(path.suffix == ".gguf" for path in found):
            raise SvskError(f"{folder}: has no config.json, but {_GGUF}")
        below = [path for path in found if (path / "config.json").is_file()]
        hint = f" Did you mean {below[0]}?" if below else ""
        raise SvskError(f"{folder}: has no config.json, so it is no model's folder.{hint}")
    declared = read_json(folder / "config.json").get("quantization_config")
    if dense and declared is not None:
        method = declared.get("quant_method") if isinstance(declared, dict) else declared
        raise SvskError(
            f"{folder}: is quantised already ({method}). Start from the unquantised model."
        )


def _file(path: Path) -> str:
    """What a file is that was named as a model, and what to do."""
    if not path.is_file():
        return "not a folder, expected a model's folder or hub name."
    with path.open("rb") as handle:
        if handle.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC or path.suffix.lower() == ".gguf":
            return _GGUF
    if path.suffix in _PARTS:
        return f"a file of a model's folder. Give the folder: {path.parent}"
    return "a file, expected a model's folder or hub name."


def _nearest(path: Path) -> str:
    """The folder beside it that may have been meant."""
    try:
        folders = [one.name for one in path.parent.iterdir() if (one / "config.json").is_file()]
    except OSError:
        return ""
    near = did_you_mean(path.name, folders)
    return f"{near.removesuffix('?')} in {path.parent}?" if near and path.parent.name else near


def _reason(error: Exception) -> str:
    """Why the hub did not give a model, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HFValidationError):
        return "it is no name that the hub can have, such as Qwen/Qwen3-4B."
    if isinstance(error, errors.GatedRepoError):
        return "its makers let in only who asked them. Ask on its page, then run `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such model, or it is private and needs `hf auth login`."
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and the local cache does not have it."
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "it cannot be reached, and the local cache does not have it."
    return f"{one_line(error).removesuffix('.')[:300]}."
