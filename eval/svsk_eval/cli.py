# SPDX-License-Identifier: Apache-2.0
"""The ``svsk`` command: the offline tool's subcommands, and those that ask how good a model is.

Heavy packages are imported by the subcommand that needs them.
"""

from svsk_eval.commands.bench import benchmark, compare
from svsk_eval.commands.evaluate import evaluate, generate
from svsk_eval.commands.report import report
from svsk_eval.commands.sweep import sweep
from svsk_eval.commands.tune import tune
from svsk_offline.app import Commands
from svsk_offline.cli import app
from svsk_offline.cli_options import examples

__all__ = ["app"]

Commands.continues |= {
    "tune": "Start it again with the same arguments to go on after the last finished trial.",
    "bench": "Start it again with the same arguments to go on after the last answer.",
    "sweep": "Start it again with the same arguments to go on after the last finished step.",
}

app.command(
    "eval",
    epilog=examples(
        "svsk eval qwen3-4b-svsk --reference Qwen/Qwen3-4B --text held_out.txt --json scores.json",
        "svsk eval qwen3-4b-svsk --text held_out.txt --engine vllm",
    ),
)(evaluate)
app.command(
    "bench",
    epilog=examples(
        "svsk bench qwen3-4b-svsk --reference Qwen/Qwen3-4B --tasks svsk_reasoning --html a.html",
        "svsk bench base=w4a16 svsk=qwen3-4b-svsk --reference Qwen/Qwen3-4B --min-recovery 0.98",
    ),
)(benchmark)
app.command(
    epilog=examples(
        "svsk compare published.json best.json",
        "svsk compare bench-a.json bench-b.json --html report.html",
    )
)(compare)
app.command(
    epilog=examples(
        "svsk tune Qwen/Qwen3-4B tuned.yaml --target-bpw 4.5 --budget-minutes 120",
        "svsk tune ./my-model tuned.yaml --recipe fast --calibration text.txt",
    )
)(tune)
app.command(
    epilog=examples(
        "svsk sweep Qwen/Qwen3-4B sweep-4b --bpw 4.25,4.45,4.62 --text held_out.txt",
        "svsk sweep ./my-model sweep --bpw 4.45 --peer gptq,awq:64 --text held_out.txt",
    )
)(sweep)
app.command(
    epilog=examples(
        "svsk report qwen3-4b-svsk --html report.html",
        "svsk report qwen3-4b-svsk --reference Qwen/Qwen3-4B --text held_out.txt --html r.html",
    )
)(report)
app.command(
    epilog=examples(
        'svsk generate qwen3-4b-svsk --prompt "The capital of France is"',
        'svsk generate ./my-model --prompt "2 + 2 =" --prompt "3 + 3 =" --engine hf',
    )
)(generate)


if __name__ == "__main__":
    app()
