# SPDX-License-Identifier: Apache-2.0
"""Files that are none, and JSON that is too much: refused at once, whatever reads them."""

import errno
import io
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from svsk_vllm.format import Checkpoint, ShardedReader, SvskFormatError, validate_checkpoint
from svsk_vllm.format.files import copy_regular, read_json, safe_handle
from tests.support.format_builders import INDEX, build_small_checkpoint


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        folder = Path.cwd()
        os.chdir(path.parent)  # a socket's path has 108 bytes at most
        try:
            server.bind(path.name)
        finally:
            os.chdir(folder)


PUT: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "folder": Path.mkdir,
    "socket": _socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "cannot be opened": lambda path: path.symlink_to(path.name),
    "no such file": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00002-of-00003.safetensors"])
@pytest.mark.parametrize("kind", PUT)
def test_only_regular_files_are_opened(tmp_path: Path, name: str, kind: str) -> None:
    build_small_checkpoint(tmp_path, shards=3)
    path = tmp_path / name
    path.unlink()
    PUT[kind](path)
    problems = validate_checkpoint(tmp_path)
    assert any(name in line and (kind in line or "neither" in line) for line in problems), problems
    with pytest.raises(SvskFormatError, match=name):
        _read_everything(tmp_path)


def _read_everything(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for name in checkpoint.tensors.names:
        checkpoint.tensors.read(name)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("FIFO", "f: is a FIFO, expected a regular file. Copy or download the folder again"),
        (
            "cannot be opened",
            r"f'?: cannot be opened \(.*Too many levels of .*\)\. Is its name right",
        ),
        ("no such file", "f: cannot be opened, no such file. Is .* a model folder"),
    ],
)
def test_what_is_no_file_is_named(tmp_path: Path, kind: str, message: str) -> None:
    PUT[kind](tmp_path / "f")
    with pytest.raises(SvskFormatError, match=message):
        read_json(tmp_path / "f")


def test_files_that_change_or_fail_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIFO takes a file's place after the look at it; a file's disk fails."""
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "fifo")
    with monkeypatch.context() as patch:
        opened = os.open
        patch.setattr(os, "open", lambda path, flags: opened(tmp_path / "fifo", flags))
        with pytest.raises(SvskFormatError, match=r"config.json: changed while it was opened"):
            read_json(tmp_path / "config.json")

    def denied(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:  # root may open anything, so that no mode would do
        patch.setattr(os, "open", denied)
        with pytest.raises(
            SvskFormatError,
            match=r"config\.json: cannot be opened \(Perm.*\)\. May this user read it",
        ):
            read_json(tmp_path / "config.json")

    class Failing(io.FileIO):
        def read(self, *_: object) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdopen", Failing)
    with pytest.raises(
        SvskFormatError,
        match=r"config\.json: cannot be read \(Input/output error\)\. Is the disk in",
    ):
        read_json(tmp_path / "config.json")


def test_a_file_that_is_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(
        SvskFormatError, match=r"cannot be opened \(.*\). Copy or download the file again"
    ):
        safe_handle(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("x", "F6_E2M3", r"x has dtype F6_E2M3 and shape \[2, 2\], which cannot be read"),
        ("\x1b[2J", "F4", r"tensor '\\x1b\[2J': expected a name of printable characters"),
    ],
)
def test_tensors_that_cannot_be_read_or_shown(
    tmp_path: Path, name: str, dtype: str, message: str
) -> None:
    """safetensors opens the file; torch has no such dtype, a terminal would obey the name."""
    size = 3 if dtype == "F6_E2M3" else 2
    header = json.dumps({name: {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, size]}})
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(size)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(SvskFormatError, match=rf"model\.safetensors: {message}"):
        ShardedReader(tmp_path).describe(name)


@pytest.mark.timeout(20)
def test_only_regular_files_are_copied(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(SvskFormatError, match="FIFO"):
        copy_regular(tmp_path / "tokenizer.json", tmp_path / "copy")
    (tmp_path / "vocabulary").write_bytes(bytes(10**6))
    (tmp_path / "link").symlink_to("vocabulary")
    copy_regular(tmp_path / "link", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == bytes(10**6)
    assert not (tmp_path / "copy").is_symlink()


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            b"{" + b" " * 2**24 + b"}", "bytes, expected at most .*This is no such file", id="large"
        ),
        pytest.param(
            b'{"a": [' + b"[]," * 2 * 10**6 + b"0]}",
            "more than 1,500,000 values. This is no such file",
            id="many",
        ),
        pytest.param(b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "nested too deeply", id="deep"),
        pytest.param(b'{"a":' * 60 + b"1" + b"}" * 60, "60 levels of nesting", id="deep enough"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON", id="digits"),
        pytest.param(b"\xff\xfe{}", "not valid JSON", id="encoding"),
        pytest.param(b"[{}]", "holds a list", id="list"),
        pytest.param(b"", "not valid JSON", id="empty"),
    ],
)
def test_json_that_is_too_much(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(SvskFormatError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_json_within_the_limits(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.gate_proj"
        for layer in range(60)
        for expert in range(256)
    ]
    value = {
        "targets": names,
        "time_step_limit": [0.0, float("inf")],
        "deep": json.loads('{"a":' * 40 + "1" + "}" * 40),
    }
    path.write_text(json.dumps(value), encoding="utf-8")
    assert read_json(path) == value


@pytest.mark.parametrize("name", ["\x1b[2Jmodel.norm.weight", "model.norm\u202e.weight", "a\nb"])
def test_names_that_a_terminal_would_obey(tmp_path: Path, name: str) -> None:
    path = tmp_path / INDEX
    build_small_checkpoint(tmp_path, shards=3)
    index = json.loads(path.read_text())
    index["weight_map"][name] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    problems = validate_checkpoint(tmp_path)
    assert len(problems) == 1
    assert repr(name) in problems[0]
    assert problems[0].isprintable()
