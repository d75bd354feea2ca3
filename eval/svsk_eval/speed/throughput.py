# SPDX-License-Identifier: Apache-2.0
"""Throughput of several models.

``python -m svsk_eval.speed.throughput run svsk=FOLDER dense=FOLDER``, under vLLM.

Each model has a process of its own. By default all are kept and asked in turn, so that a busy
machine slows all of them alike, and share a GPU's memory in equal parts; ``--one-at-a-time`` is for
a GPU that holds one of them. How a folder is served follows from its label, see
:mod:`svsk_eval.speed.throughput_labels`.
"""

import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import TypeAdapter
from rich.console import Console

from svsk_eval.errors import EvalError
from svsk_eval.speed.throughput_labels import Served, describe, read_models
from svsk_eval.speed.throughput_server import Load, Server, serve
from svsk_eval.text.engine_args import parse_engine_args
from svsk_kernels.errors import SvskError
from svsk_offline.command_app import App
from svsk_offline.console_tables import new_table, show_table
from svsk_offline.storage.atomic import write_json, write_text
from svsk_vllm.format.shards import read_json

__all__ = ["Speeds", "app", "measure", "speeds_of", "table_rows"]

_MEMORY: Final = 0.9
"""Share of a GPU's memory that all engines take together; vLLM itself would give 0.92 to each."""

_SHORTEST_STEP: Final = 512

_RESERVED: Final = ("model", "max_model_len", "enable_prefix_caching", "skip_tokenizer_init")


@dataclass(frozen=True)
class Speeds:
    """Tokens per second of all requests together, medians.

    Attributes:
        decode: decoded tokens over the time that decoding them adds to that of the prompts and the
            first ones.
        output: all generated tokens over the whole time, prompts included.
    """

    decode: float
    output: float


_SPEEDS: Final = TypeAdapter(dict[str, dict[int, Speeds]])


def speeds_of(first: list[float], whole: list[float], batch: int, load: Load) -> Speeds:
    """Speeds from seconds for the first tokens alone and for all, measured in turn.

    Raises:
        EvalError: decoding took no measurable time.
    """
    more = load.tokens + 1 - load.first(batch)
    added = statistics.median([b - a for a, b in zip(first, whole, strict=True)])
    if added <= 0:
        raise EvalError(
            f"batch {batch}: {more} more tokens took {added:.4f} s more. Raise --tokens or"
            " --repeats: the time of the prompts varies more than decoding takes."
        )
    return Speeds(batch * more / added, batch * (load.tokens + 1) / statistics.median(whole))


def measure(
    models: Mapping[str, Served],
    load: Load,
    *,
    one_at_a_time: bool = False,
    engine: Mapping[str, Any] | None = None,
    speeds: dict[str, dict[int, Speeds]] | None = None,
    done: Callable[[str], None] = lambda label: None,
) -> dict[str, dict[int, Speeds]]:
    """Speeds by label and batch size.

    Args:
        models: by label.
        load: what to ask for.
        one_at_a_time: end each model's process before the next one starts.
        engine: further arguments of ``vllm.LLM``.
        speeds: speeds that are known already; those models are left out.
        done: called with a label when its figures are complete.

    Raises:
        EvalError: a model does not run, or an engine argument is not one to set.
    """
    for name in engine or {}:
        if name in _RESERVED:
            raise EvalError(
                f"--engine-arg {name}: it follows from the other arguments. Leave it out."
            )
    for batch in load.batches:
        load.first(batch)
    speeds = {} if speeds is None else speeds
    left = {label: model for label, model in models.items() if label not in speeds}
    groups = [[label] for label in left] if one_at_a_time else [list(left)] if left else []
    shares = (
        {"gpu_memory_utilization": round(_MEMORY / len(groups[0]), 3)}
        if groups and _on_gpu()
        else {}
    )
    for group in groups:
        servers: dict[str, Server] = {}
        times: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
        try:
            for label in group:
                model = left[label]
                arguments = shares | dict(engine or {}) | dict(model.engine)
                servers[label] = Server(model.folder, load, model.environment, arguments)
            for batch in load.batches:
                for repeat in range(load.repeats + 1):
                    for label, server in servers.items():
                        first = server.seconds(batch, load.first(batch))
                        whole = server.seconds(batch, load.tokens + 1)
                        if repeat:
                            firsts, wholes = times.setdefault((label, batch), ([], []))
                            firsts.append(first)
                            wholes.append(whole)
        finally:
            for server in servers.values():
                server.close()
        failed = []
        for label in group:
            try:
                speeds[label] = {
                    batch: speeds_of(*times[label, batch], batch, load) for batch in load.batches
                }
            except EvalError as error:
                failed.append(f"{label}, {error}")
                continue
            done(label)
        if failed:
            raise EvalError(" ".join(failed))
    return speeds


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def table_rows(
    speeds: Mapping[str, Mapping[int, Speeds]], load: Load, kind: str
) -> list[list[str]]:
    """Per model: tokens per second by batch, and the ratio to the last model.

    ``kind`` is a field of Speeds.
    """
    last = list(speeds.values())[-1]

    def cell(speeds: Speeds, reference: Speeds) -> str:
        value = getattr(speeds, kind)
        return f"{value:.0f} ({value / getattr(reference, kind):.2f}x)"

    return [
        [label, *(cell(by_batch[b], last[b]) for b in load.batches)]
        for label, by_batch in speeds.items()
    ]


def _machine() -> dict[str, str]:
    """Versions, and the GPU if there is one."""
    import torch

    names = ("vllm", "torch", "transformers", "svsk-vllm")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {name: metadata.version(name) for name in names} | {"device": device}


def _resume(
    path: Path | None, settings: dict[str, Any], models: dict[str, Any]
) -> dict[str, dict[int, Speeds]]:
    """Figures that ``path`` holds, if its settings and those of its models are the same."""
    if path is None:
        raise typer.BadParameter("--resume needs --json, the file to go on from")
    if not path.exists():
        return {}
    stored = read_json(path)
    now = settings | {"models": {label: models.get(label) for label in stored["models"]}}
    before = stored["settings"] | {"models": stored["models"]}
    if now != before:
        raise EvalError(
            f"{path}: measured with {before}, now {now} is asked for."
            " Give the same, or another --json."
        )
    return _SPEEDS.validate_python(stored["tokens_per_second"])


def _report(
    console: Console, speeds: Mapping[str, Mapping[int, Speeds]], load: Load, markdown: Path | None
) -> None:
    lines: list[str] = []
    for kind, title in (
        ("decode", "decoded tokens/s"),
        ("output", "output tokens/s, prompts included"),
    ):
        headings = ["model", *(f"batch {count}" for count in load.batches)]
        rows = table_rows(speeds, load, kind)
        table = new_table(*headings, numbers=range(1, len(headings)))
        for row in rows:
            table.add_row(*row)
        console.print(title, markup=False)
        show_table(console, table)
        cells = [headings, ["---"] * len(headings), *rows]
        lines += [
            f"{title.capitalize()}:\n\n",
            *(f"| {' | '.join(line)} |\n" for line in cells),
            "\n",
        ]
    if markdown:
        write_text(markdown, "".join(lines).rstrip("\n") + "\n")


app = App(add_completion=False)


@app.command()
def run(
    models: Annotated[
        list[str],
        typer.Argument(
            help="LABEL=FOLDER. @w4a16, @split, @int8 or a dtype such as @float32 in the label says"
            " how it is served. The last is 1x."
        ),
    ],
    batches: Annotated[
        str, typer.Option(help="Numbers of requests that are sent together.")
    ] = "1,8,32",
    input_len: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 16,
    tokens: Annotated[
        int, typer.Option(min=2, help="To decode per request, after the first.")
    ] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, of which medians are taken.")] = 5,
    one_at_a_time: Annotated[
        bool, typer.Option("--one-at-a-time", help="Keep one model in memory.")
    ] = False,
    engine_arg: Annotated[
        list[str] | None, typer.Option(help="name=value for vllm.LLM; may be repeated.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures there, model by model.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out models that --json has.")
    ] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables there.")] = None,
) -> None:
    """Measure the throughput of models."""
    console = Console(highlight=False)
    try:
        engine = parse_engine_args(engine_arg or [])
        counts = tuple(int(text) for text in batches.split(","))
        # An engine begins with a step of this size, which takes a CPU long: no larger than the
        # prompts need.
        needed = max(
            _SHORTEST_STEP,
            min(Load.step_tokens, max(counts) * input_len),
            input_len + tokens + 1,
            *counts,
        )
        step = engine.setdefault("max_num_batched_tokens", needed)
        load = Load(input_len, tokens, counts, repeats, step)
        settings = asdict(load) | {
            "batches": list(load.batches),
            "engine": engine,
            "one_at_a_time": one_at_a_time,
        }
        with tempfile.TemporaryDirectory(prefix="svsk-throughput-") as work:
            served = read_models(models, Path(work))
            described = {
                label: describe(text, served[label])
                for text, label in zip(models, served, strict=True)
            }
            speeds = _resume(json_file, settings, described) if resume else {}

            def save(label: str) -> None:
                console.print(f"{label}: measured")
                if json_file:
                    content = {
                        "machine": _machine(),
                        "settings": settings,
                        "tokens_per_second": _SPEEDS.dump_python(speeds, mode="json"),
                    }
                    write_json(
                        json_file,
                        content | {"models": {label: described[label] for label in speeds}},
                    )

            measure(
                served, load, one_at_a_time=one_at_a_time, engine=engine, speeds=speeds, done=save
            )
    except SvskError as error:
        console.print(f"[red]Error:[/red] {error}")
        raise typer.Exit(1) from error
    _report(console, {label: speeds[label] for label in served}, load, markdown)


app.command("serve", hidden=True)(serve)

if __name__ == "__main__":
    app()
