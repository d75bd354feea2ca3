# SPDX-License-Identifier: Apache-2.0
"""Pack vLLM and what it needs into a few files, to be carried to a GPU machine that has no network.

    python .ci/gpu/bundle.py .gpu

downloads the wheels that ``requirements.txt`` beside this file pins, leaves out what a Hopper GPU
does not need of them, compresses them better, and cuts the whole into parts of a size that can
travel. Every part is a folder of its own, which also holds the manifest; ``install.py`` puts them
together again on the machine.
"""

from __future__ import annotations

import base64
import csv
import fnmatch
import hashlib
import io
import json
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

HERE: Final = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from setup_env import SetupError, check, normalised, read_pins, run_captured  # noqa: E402

__all__ = ["BundleError", "app", "bundle", "download", "slim"]

REQUIREMENTS: Final = HERE / "requirements.txt"

PYTHON: Final = "3.12"
PLATFORMS: Final = (
    *("manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"),
    *(f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)),
)
"""Wheels for these run where the C library is glibc 2.39 or later.

Pip matches every name exactly.
"""

DROPPED: Final[dict[str, tuple[str, ...]]] = {
    "vllm": (
        # FlashAttention 2: vLLM takes version 3 on a GPU of capability 9.0
        "vllm/vllm_flash_attn/_vllm_fa2_C*",
        "vllm/_moe_C*",  # kernels of mixtures of experts; vLLM imports them where they are
        "vllm/vllm-rs",  # an HTTP front end that has to be asked for
        # products of 8-bit floats, compiled on the spot; vLLM does without
        "vllm/third_party/deep_gemm/*",
        "vllm/third_party/fmha_sm100/*",  # attention on a GPU of capability 10.0
    )
}
"""Members left out, as patterns by distribution."""

MANIFEST: Final = "manifest.json"
DATA: Final = "data"
_CHUNK: Final = 1 << 20


class BundleError(Exception):
    """What cannot be packed, and what to do about it."""


def download(requirements: Path, folder: Path) -> list[Path]:
    """Let pip download the pinned wheels, without their needs.

    Args:
        requirements: file of ``name==version`` lines.
        folder: where they go; wheels that are there already are not downloaded again.

    Returns:
        The wheels in the order of their names.

    Raises:
        BundleError: the folder holds another set of wheels afterwards.
        SetupError: a line is no pin, or pip fails.
    """
    pins = {name: pin.partition("==")[2] for name, pin in read_pins(requirements).items()}
    requirements, folder = requirements.resolve(), folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    # pip looks into the folder too: a second run downloads what is missing.
    command += [
        "--find-links",
        str(folder),
        "--dest",
        str(folder),
        "--requirement",
        str(requirements),
    ]
    check(run_captured(command), "pip download", "Run the same command again: it goes on.")
    wheels = sorted(folder.glob("*.whl"), key=lambda path: path.name.lower())
    found = sorted(_name_and_version(wheel) for wheel in wheels)
    if found != sorted(pins.items()):
        odd = sorted(set(found) ^ set(pins.items()))
        names = ", ".join(f"{name} {version}" for name, version in odd)
        raise BundleError(
            f"{folder} does not hold what {requirements.name} pins, once each: {names}. Empty it."
        )
    return wheels


def _name_and_version(wheel: Path) -> tuple[str, str]:
    name, version = wheel.name.split("-")[:2]
    return normalised(name), version


def slim(wheel: Path, out: Path, dropped: Sequence[str] = ()) -> list[str]:
    """Write a wheel again, compressed by LZMA and without some of its members.

    pip installs it as it does any other; what the manifest RECORD says of the other members still
    holds.

    Args:
        wheel: the wheel.
        out: file to write.
        dropped: patterns of names.

    Returns:
        Names of the members left out.

    Raises:
        BundleError: a pattern matches no member, or the wheel's RECORD does not list a member with
            its hash.
    """
    left_out: list[str] = []
    partial = out.with_name(f"{out.name}.partial")
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_LZMA) as target,
    ):
        names = [info.filename for info in source.infolist()]
        for pattern in dropped:
            matched = fnmatch.filter(names, pattern)
            if not matched:
                raise BundleError(
                    f"{wheel.name}: no member is called {pattern}. Mend the list DROPPED in"
                    f" {__file__}."
                )
            left_out += matched
        for info in source.infolist():
            if info.filename in left_out:
                continue
            data = source.read(info)
            if re.fullmatch(r"[^/]+\.dist-info/RECORD", info.filename):
                data = _shorter_record(data, set(left_out))
            info.compress_type = zipfile.ZIP_LZMA
            target.writestr(info, data, zipfile.ZIP_LZMA)
    partial.replace(out)
    _check_record(out)
    return left_out


def _shorter_record(record: bytes, left_out: set[str]) -> bytes:
    """RECORD without some members."""
    text = io.StringIO()
    rows = csv.reader(record.decode("utf-8").splitlines())
    csv.writer(text, lineterminator="\n").writerows(
        row for row in rows if row and row[0] not in left_out
    )
    return text.getvalue().encode()


def _check_record(wheel: Path) -> None:
    """Read every member back and compare it with RECORD."""
    with zipfile.ZipFile(wheel) as archive:
        members = {info.filename for info in archive.infolist() if not info.is_dir()}
        (record,) = [name for name in members if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)]
        hashes = {
            row[0]: row[1]
            for row in csv.reader(archive.read(record).decode("utf-8").splitlines())
            if row
        }
        for name in sorted(members - {record}):
            if name.endswith((".dist-info/RECORD.jws", ".dist-info/RECORD.p7s")):
                continue
            digest = (
                base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest())
                .rstrip(b"=")
                .decode()
            )
            if hashes.get(name) != f"sha256={digest}":
                raise BundleError(
                    f"{wheel.name}: RECORD says {hashes.get(name)!r} of {name}, found"
                    f" sha256={digest}."
                )
    if gone := set(hashes) - members:
        raise BundleError(
            f"{wheel.name}: RECORD lists {', '.join(sorted(gone)[:5])}, which the wheel does not"
            " hold."
        )


def bundle(wheels: Sequence[Path], out: Path, part_bytes: int) -> list[Path]:
    """Write the parts: the wheels one after the other, cut wherever a part is full.

    Args:
        wheels: files, which keep their names.
        out: folder that gets ``part-0``, ``part-1`` and so on, in place of older ones.
        part_bytes: most bytes of a part.

    Returns:
        The folders of the parts.
    """
    for old in out.glob("part-*"):
        shutil.rmtree(old)
    parts: list[Path] = []
    described = []
    for number, data in enumerate(_pieces(wheels, part_bytes)):
        parts.append(out / f"part-{number}")
        parts[-1].mkdir(parents=True)
        (parts[-1] / DATA).write_bytes(data)
        described.append(
            {"name": parts[-1].name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        )
    listed = [
        {"name": path.name, "size": path.stat().st_size, "sha256": _sha256(path)} for path in wheels
    ]
    text = json.dumps({"parts": described, "wheels": listed}, indent=1) + "\n"
    for part in parts:
        (part / MANIFEST).write_text(text, encoding="utf-8")
    return parts


def _pieces(files: Sequence[Path], size: int) -> Iterator[bytes]:
    """The bytes of files put together, ``size`` at a time."""
    pending = bytearray()
    for path in files:
        with path.open("rb") as source:
            while data := source.read(_CHUNK):
                pending += data
                while len(pending) >= size:
                    yield bytes(pending[:size])
                    del pending[:size]
    if pending:
        yield bytes(pending)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    out: Annotated[Path, typer.Argument(help="Folder for the parts; git should ignore it.")],
    part_mb: Annotated[
        int, typer.Option(min=1, help="Most megabytes (10^6 bytes) of a part.")
    ] = 56,
    requirements: Annotated[Path, typer.Option(help="The pinned wheels.")] = REQUIREMENTS,
    wheels: Annotated[
        Path | None,
        typer.Option(help="Keep the downloaded wheels there, and take them from there."),
    ] = None,
) -> None:
    """Download, slim and cut the wheels."""
    try:
        with tempfile.TemporaryDirectory(prefix="svsk-bundle-") as work:
            slimmed = []
            for wheel in download(requirements, wheels or Path(work, "wheels")):
                slimmed.append(Path(work, wheel.name))
                left_out = slim(wheel, slimmed[-1], DROPPED.get(_name_and_version(wheel)[0], ()))
                before, after = wheel.stat().st_size / 1e6, slimmed[-1].stat().st_size / 1e6
                without = f", without {len(left_out)} members" if left_out else ""
                print(f"{wheel.name}: {before:.2f} to {after:.2f} MB{without}", flush=True)
            parts = bundle(slimmed, out, part_mb * 1_000_000)
            total = sum(path.stat().st_size for path in slimmed) / 1e6
    except (BundleError, SetupError) as error:
        print(f"Nothing was packed. {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"{len(slimmed)} wheels, {total:.1f} MB in {len(parts)} parts:")
    for part in parts:
        print(f"{part}: {sum(path.stat().st_size for path in part.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    app()
