# SPDX-License-Identifier: Apache-2.0
"""How commands end: one line and an exit status, whatever stops them."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import svsk_offline.pipeline
from svsk_eval.cli import app
from svsk_offline.endings import Stopped, plain_endings
from svsk_offline.pipeline import Progress, quantize
from svsk_offline.recipe import Recipe
from svsk_offline.storage.layer_report import LayerReport
from tests.offline.folders import folder_bytes

SMALL = [
    "--recipe",
    "published",
    "--rank",
    4,
    "--tile-m",
    48,
    "--tile-n",
    96,
    "--samples",
    4,
    "--seq-len",
    32,
]


def svsk(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )


def raiser(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            1,
            "/x/y: no room (No space left on device)",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "/x/y"),
            1,
            "/x/y: no such file or folder",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 1, "/x/y: Permission denied."),
        (OSError("cannot load\nthe tokenizer"), 1, "cannot load the tokenizer"),
        (
            MemoryError("Unable to allocate 9 TiB"),
            1,
            "not enough memory (Unable to allocate 9 TiB)",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "not enough memory (CUDA out of memory)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "not enough memory"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C. Start it again"),
        (Stopped(signal.SIGTERM), 143, "stopped by SIGTERM. Start it again"),
        (Stopped(signal.SIGHUP), 129, "stopped by SIGHUP. Start it again"),
    ],
)
def test_what_stops_a_run_is_one_line(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    line: str,
) -> None:
    monkeypatch.setattr(svsk_offline.pipeline, "load_calibration", raiser(error))
    result = svsk("quantize", tiny_llama, tmp_path / "out", *SMALL)
    assert result.exit_code == status
    assert line in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []  # no lock stays


def test_a_bug_says_where_to_report_it_and_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("svsk_offline.storage.hub.check_checkpoint", raiser(KeyError("weights")))
    result = svsk("inspect", tmp_path)
    assert result.exit_code == 1
    (log,) = tmp_path.glob("svsk-*.log")
    assert "KeyError: 'weights'. This is a bug" in result.stderr
    assert str(log) in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" in log.read_text()
    assert "in fail" in log.read_text()
    monkeypatch.setenv("SVSK_DEBUG", "1")
    with pytest.raises(KeyError):
        svsk("inspect", tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_unwind(number: signal.Signals) -> None:
    # The tests themselves may run where it is ignored, as under nohup.
    signal.signal(number, signal.SIG_DFL)
    lines: list[str] = []
    unwound = []

    @plain_endings(lines.append)
    def run() -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            unwound.append(True)

    with pytest.raises(SystemExit) as ended:
        run()
    assert unwound
    assert ended.value.code == 128 + number
    assert lines == [f"stopped by {number.name}."]
    assert signal.getsignal(number) == signal.SIG_DFL


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with plain_endings(pytest.fail):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_wrong_arguments_are_not_taken_for_a_bug() -> None:
    result = svsk("inspect", "--nonsense")
    assert result.exit_code == 2
    assert "No such option" in result.stderr
    assert "bug" not in result.stderr


@pytest.mark.parametrize(
    ("redirection", "status", "stderr"),
    [
        ("| true", 1, ""),
        (">&- <&-", 0, ""),
        ("> /dev/full", 1, "error: no room (No space left on device)"),
    ],
)
def test_standard_streams(redirection: str, status: int, stderr: str) -> None:
    """Nobody reads the output, it is closed, or its disk is full."""
    if "/dev/full" in redirection and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    command = (
        f"set -o pipefail; (sleep 0.1; {sys.executable} -m svsk_eval.cli recipes) {redirection}"
    )
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == status
    assert done.stderr.startswith(stderr)
    assert len(done.stderr.splitlines()) == bool(stderr)


@pytest.mark.parametrize("read", [False, True])
def test_a_pipe_that_nobody_reads_is_no_error(read: bool) -> None:
    """Also where no buffer holds what could not be written; other pipes are errors."""
    program = (
        "import sys; from svsk_offline.endings import plain_endings\n"
        "with plain_endings(lambda text: print(text, file=sys.stderr)):\n"
        "    raise BrokenPipeError(32, 'Broken pipe')"
    )
    reader, writer = os.pipe()
    if not read:
        os.close(reader)
    run = subprocess.run(
        [sys.executable, "-c", program],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    if read:
        os.close(reader)
    assert run.returncode == 1
    assert run.stderr == ("[Errno 32] Broken pipe\n" if read else "")


def test_full_disk_then_room_again(tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe) -> None:
    """A limit on the size of files stands in for the full disk.

    The run goes on to the same bytes.
    """
    quantize(tiny_llama, tmp_path / "whole", tiny_recipe)
    shards = sorted(
        (tmp_path / "whole").glob("*.safetensors"), key=lambda path: path.stat().st_size
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (shards[-1].stat().st_size - 1, before[1]))
    try:
        result = svsk("quantize", tiny_llama, tmp_path / "out", *SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 1
    assert (
        ".safetensors: no room (File too large). Make room for it. Start it again" in result.stderr
    )
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("*.tmp"))
    quantize(tiny_llama, tmp_path / "out", tiny_recipe)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_output_folder_removed_under_the_run(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    def remove(report: LayerReport) -> None:
        subprocess.run(
            ["rm", "-r", tmp_path / "out.partial"], check=False, stderr=subprocess.DEVNULL
        )

    with pytest.raises(FileNotFoundError) as lost:
        quantize(tiny_llama, tmp_path / "out", tiny_recipe, progress=Progress(layer=remove))
    assert str(lost.value.filename).startswith(str(tmp_path / "out.partial"))
    assert list(tmp_path.iterdir()) == []
    quantize(tiny_llama, tmp_path / "out", tiny_recipe)
