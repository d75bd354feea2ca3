# SPDX-License-Identifier: Apache-2.0
"""Decode throughput of several models under vLLM: ``python -m svsk_eval.throughput svsk=FOLDER dense=FOLDER``.

Each model has a process of its own; all are kept and asked in turn, so that a busy machine slows all of them alike. On
a GPU they share its memory in equal parts. A label that ends in ``@w4a16`` serves the base of its SVSK folder without
the sidecar, as a compressed-tensors model.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from svsk_eval.engine_args import parse_engine_args
from svsk_eval.errors import EvalError
from svsk_eval.w4a16 import write_w4a16
from svsk_offline.atomic import write_json, write_text

__all__ = ["Server", "app", "measure"]

_PROMPT: Final = 16
_CONVERTED: Final = "@w4a16"

_MEMORY: Final = 0.9
"""Share of a GPU's memory that all engines take together; vLLM itself would give 0.92 to each."""

_RESERVED: Final = ("model", "max_model_len", "enable_prefix_caching")


class Server:
    """A model in a process of its own.

    Args:
        model: model folder.
        tokens: most tokens to generate.
        engine_args: further arguments of ``vllm.LLM``, values as in JSON.
    """

    def __init__(self, model: Path, tokens: int, engine_args: Mapping[str, Any]) -> None:
        read, write = os.pipe()
        # The engine in the process itself, so that nothing but the model competes for the cores.
        environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | os.environ
        command = [sys.executable, "-m", "svsk_eval.throughput", "serve"]
        command += [str(model), str(tokens), str(write), json.dumps(dict(engine_args))]
        self.model = model
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=sys.stderr, text=True, pass_fds=[write], env=environment
        )
        os.close(write)
        self.answers = os.fdopen(read)
        self._answer()

    def seconds(self, batch: int, tokens: int) -> float:
        """Time to generate ``tokens`` tokens for each of ``batch`` short prompts."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batch} {tokens}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.answers.close()

    def _answer(self) -> float:
        line = self.answers.readline()
        if not line:
            raise EvalError(f"{self.model}: the vLLM process ended, see its output above.")
        return float(line)


def serve(model: Path, tokens: int, pipe: int, engine_args: str) -> None:
    """Answer requests on stdin: batch and tokens, to seconds."""
    from vllm import LLM, SamplingParams

    more = json.loads(engine_args)
    llm: Any = LLM(model=str(model), max_model_len=_PROMPT + tokens, enable_prefix_caching=False, **more)
    with os.fdopen(pipe, "w", buffering=1) as answers:
        answers.write("0\n")
        for line in sys.stdin:
            batch, count = map(int, line.split())
            prompts = [{"prompt_token_ids": [100 + i + j for j in range(_PROMPT)]} for i in range(batch)]
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            start = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            answers.write(f"{time.perf_counter() - start}\n")


def measure(
    models: dict[str, Path],
    batches: list[int],
    tokens: int,
    repeats: int,
    engine_args: Mapping[str, Any] | None = None,
) -> dict[str, dict[int, float]]:
    """Median decoded tokens per second, by label and batch size; the prompts' share of the time is taken off.

    Args:
        models: folders by label.
        batches: numbers of requests that run together.
        tokens: to decode per request.
        repeats: of each measurement, after one that does not count.
        engine_args: for ``vllm.LLM``, of all models.

    Raises:
        EvalError: a model does not run, or an engine argument is not one to set.
    """
    for name in engine_args or {}:
        if name in _RESERVED:
            raise EvalError(f"--engine-arg {name}: it follows from the other arguments. Leave it out.")
    arguments = {"gpu_memory_utilization": round(_MEMORY / len(models), 3), **(engine_args or {})}
    servers: dict[str, Server] = {}
    found: dict[str, dict[int, float]] = {label: {} for label in models}
    try:
        for label, folder in models.items():
            servers[label] = Server(folder, tokens + 1, arguments)
        for batch in batches:
            speeds: dict[str, list[float]] = {label: [] for label in models}
            for repeat in range(repeats + 1):
                for label, server in servers.items():
                    first, whole = server.seconds(batch, 1), server.seconds(batch, tokens + 1)
                    if repeat:
                        speeds[label].append(batch * tokens / (whole - first))
            for label, values in speeds.items():
                found[label][batch] = statistics.median(values)
    finally:
        for server in servers.values():
            server.close()
    return found


def table_rows(found: dict[str, dict[int, float]], batches: list[int]) -> list[list[str]]:
    """Per model: tokens per second by batch, and the ratio to the last model."""
    last = list(found.values())[-1]
    return [
        [label, *(f"{speeds[b]:.0f} ({speeds[b] / last[b]:.2f}x)" for b in batches)] for label, speeds in found.items()
    ]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    models: Annotated[list[str], typer.Argument(help="LABEL=FOLDER, or LABEL@w4a16=SVSK_FOLDER. The last is 1.00x.")],
    batches: Annotated[str, typer.Option(help="Numbers of requests that run together.")] = "1,8,32",
    tokens: Annotated[int, typer.Option(min=2, help="To decode per request.")] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    engine_arg: Annotated[
        list[str] | None, typer.Option(help="Argument of vllm.LLM for all models, NAME=VALUE with VALUE as in JSON.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table there.")] = None,
) -> None:
    """Measure decode throughput of models in turn."""
    counts = [int(text) for text in batches.split(",")]
    arguments = parse_engine_args(engine_arg or [])
    with tempfile.TemporaryDirectory(prefix="svsk-throughput-") as work:
        folders: dict[str, Path] = {}
        for text in models:
            label, sign, folder = text.partition("=")
            if not sign:
                raise typer.BadParameter(f"{text}: expected LABEL=FOLDER")
            if label.endswith(_CONVERTED):
                folders[label] = write_w4a16(Path(folder), Path(work, str(len(folders))))
            else:
                folders[label] = Path(folder)
        found = measure(folders, counts, tokens, repeats, arguments)
    headings = ["model", *(f"batch {count}, tokens/s" for count in counts)]
    rows = table_rows(found, counts)
    table = Table(*headings)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if json_file:
        write_json(
            json_file, {"tokens": tokens, "repeats": repeats, "engine_args": arguments, "tokens_per_second": found}
        )
    if markdown:
        lines = [headings, ["---"] * len(headings), *rows]
        write_text(markdown, "".join(f"| {' | '.join(line)} |\n" for line in lines))


app.command("serve", hidden=True)(serve)

if __name__ == "__main__":
    app()
