# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/tutorial.md, from an installed wheel, on a tiny model with one thread."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.local_hub import COMMIT, Hub, running_hub
from tests.support.tiny_models import write_dense
from tests.support.wheels import build_wheel, tracked_files

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PORT = "8000"
SERVER = "server"
SECONDS = 600
"""For a block, and for the server to start, on a busy machine."""

NEEDED = {
    "vllm serve": "vllm",
    "ask.py": "openai",
    "svsk bench": "lm_eval",
    "--html report": "matplotlib",
}
"""Packages of commands, by what they contain."""

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@dataclass(frozen=True)
class Block:
    """A block of code: what the comment before it says, its language, its text."""

    comment: str
    language: str
    text: str


def blocks_of(page: str) -> list[Block]:
    """The blocks of code of a page, in order."""
    fence = re.compile(
        r"(?:^<!-- ([^\n]*) -->\n\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
    )
    return [Block(*found) for found in fence.findall(page)]


BLOCKS = blocks_of(PAGE.read_text(encoding="utf-8"))
COMMANDS = [block for block in BLOCKS if block.language == "sh"]


@dataclass
class Place:
    """The empty folder of a new user, and what stands in for the rest of the world."""

    folder: Path
    model: Path
    hub: Hub
    port: int
    environment: dict[str, str]
    servers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def here(self, text: str) -> str:
        """A block's text with the tiny model's folder for the model, and a port that is free."""
        return text.replace(MODEL, str(self.model)).replace(PORT, str(self.port))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """An environment of its own that finds this one's packages, but no checkout."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; `make setup` installs it")
    root = tmp_path_factory.mktemp("tutorial")
    source = tracked_files(root / "source")
    folder = root / "empty"
    folder.mkdir()
    build_wheel(source, folder)
    write_dense(root / "model", "llama")
    (root / "model" / "chat_template.jinja").write_text(TEMPLATE)
    programs = _environment(root / "venv")
    with running_hub() as hub:
        environment = {
            **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PIP_NO_INDEX": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "t",
            "OMP_NUM_THREADS": "1",
        }
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        one = Place(folder, root / "model", hub, port, environment)
        for block in BLOCKS:
            if block.language == "python":
                (folder / block.comment).write_text(one.here(block.text))
        yield one
        for server in one.servers:
            server.terminate()
            server.wait(timeout=60)


def _environment(folder: Path) -> Path:
    """Make an environment that also finds the packages of this one; where its programs are."""
    venv = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(venv, check=True)
    programs = folder / "bin"
    (inner,) = folder.glob("lib/python*/site-packages")
    (inner / "outer.pth").write_text(sysconfig.get_path("purelib"))
    pip = f'#!/bin/sh\nexec "{sys.executable}" -m pip --python "{programs}/python" "$@"\n'
    (programs / "pip").write_text(pip)
    # Those of packages that the wheel's are run with: with this environment's interpreter.
    for name in ("vllm", "lm_eval"):
        theirs = Path(sys.executable).parent / name
        if theirs.is_file():
            _, _, rest = theirs.read_text().partition("\n")
            (programs / name).write_text(f"#!{programs}/python\n{rest}")
    for program in ("pip", "vllm", "lm_eval"):
        if (programs / program).exists():
            (programs / program).chmod(0o755)
    return programs


def test_the_page_has_what_the_test_looks_for() -> None:
    everything = "".join(block.text for block in COMMANDS)
    for command in ("pip install", "quantize", "inspect", "report", "vllm serve", "curl", "eval"):
        assert command in everything
    assert MODEL in everything
    assert [block.comment for block in BLOCKS if block.comment] == [SERVER, "ask.py"]
    assert {block.language for block in BLOCKS} == {"sh", "python"}


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_commands(place: Place, number: int) -> None:
    """Each block in a shell that stops at the first failure; one needs those before it."""
    block = COMMANDS[number]
    for sign, package in NEEDED.items():
        if sign in block.text and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if "curl" in block.text and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    script = place.here(block.text)
    if block.comment == SERVER:
        _serve(place, script)
        return
    environment = place.environment
    if "svsk push" in script:
        environment = {**environment, "HF_HUB_OFFLINE": "0"}
    run = subprocess.run(
        ["bash", "-euc", script],
        cwd=place.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "Traceback" not in run.stderr
    if "curl" in script:
        assert '"text"' in run.stdout
    if "svsk push" in script:
        assert run.stdout.strip() == f"{place.hub.url}/me/smollm2-svsk/commit/{COMMIT}"
        assert {"config.json", "README.md", "model.safetensors"} <= {*place.hub.files}


def _serve(place: Place, script: str) -> None:
    """Start the server in a terminal of its own, and wait until it answers."""
    lines = script.strip().splitlines()
    lines[-1] = f"exec {lines[-1]}"
    log = place.folder / "server.log"
    with log.open("wb") as sink:
        server = subprocess.Popen(
            ["bash", "-euc", "\n".join(lines)],
            cwd=place.folder,
            env=place.environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    place.servers.append(server)
    deadline = time.monotonic() + SECONDS
    while True:
        assert server.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{place.port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
