# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` with the flag, asked by an OpenAI client on the loopback interface."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import torch

from tests.serving.conftest import serving_environment

START_SECONDS = 400


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(model: Path, log: Path) -> Iterator[str]:
    """A running server, yielded as its base URL once it is healthy."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        str(Path(sys.executable).parent / "vllm"),
        "serve",
        str(model),
        "--quantization",
        "svsk",
    ]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        "svsk",
        "--enforce-eager",
    ]
    command += ["--max-model-len", "512"]
    with (
        log.open("w") as sink,
        subprocess.Popen(
            command, env=serving_environment(), stdout=sink, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                assert process.poll() is None, f"server ended: {log.read_text()[-4000:]}"
                assert time.monotonic() < deadline, f"server not up: {log.read_text()[-4000:]}"
                try:
                    if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)


def test_generate_command(tiny_pair: Any) -> None:
    """``svsk generate`` through vLLM, prompts in one batch."""
    command = [
        str(Path(sys.executable).parent / "svsk"),
        "generate",
        str(tiny_pair("llama", torch.bfloat16).svsk),
    ]
    command += ["--prompt", "one two three", "--prompt", "four", "--max-tokens", "4"]
    done = subprocess.run(
        command,
        env=serving_environment(),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "one two three" in done.stdout
    assert "four" in done.stdout
    assert len(done.stdout.strip()) > len("one two three four")


def test_openai_client(smollm2_pair: Any, tmp_path: Path) -> None:
    with server(smollm2_pair("float16").svsk, tmp_path / "log") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
        assert [model.id for model in client.models.list()] == ["svsk"]
        completion = client.completions.create(
            model="svsk", prompt="The capital of France is", max_tokens=8, temperature=0
        )
        assert "Paris" in completion.choices[0].text
        chat = client.chat.completions.create(
            model="svsk",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=24,
            temperature=0,
        )
        assert "Paris" in (chat.choices[0].message.content or "")
