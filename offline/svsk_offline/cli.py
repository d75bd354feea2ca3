# SPDX-License-Identifier: Apache-2.0
"""The commands of the offline tool, put together; each imports the heavy packages it needs."""

from svsk_offline.app import Together, app
from svsk_offline.cli_options import examples
from svsk_offline.commands.checkpoints import diff, inspect, validate
from svsk_offline.commands.export import export, push, restore
from svsk_offline.commands.quantize import quantize
from svsk_offline.commands.recipes import recipes

__all__ = ["app"]

app.command(
    cls=Together,
    epilog=examples(
        "svsk quantize Qwen/Qwen3-4B qwen3-4b-svsk --calibration text.txt --target-bpw 4.5",
        "svsk quantize ./my-model my-model-svsk --recipe fast --rank 16 --dry-run",
    ),
)(quantize)
app.command(epilog=examples("svsk recipes", "svsk recipes best > mine.yaml"))(recipes)
app.command(
    epilog=examples("svsk inspect qwen3-4b-svsk", "svsk inspect qwen3-4b-svsk --json sizes.json")
)(inspect)
app.command(
    epilog=examples("svsk validate qwen3-4b-svsk", "svsk validate downloaded --json - --quiet")
)(validate)
app.command(
    epilog=examples(
        "svsk export qwen3-4b-svsk qwen3-4b.gguf --to gguf --lora qwen3-4b-sidecar.gguf",
        "svsk export qwen3-4b-svsk qwen3-4b-w4a16 --to compressed-tensors",
    )
)(export)
app.command(
    epilog=examples(
        "svsk restore qwen3-4b-svsk qwen3-4b-dense",
        "svsk restore qwen3-4b-svsk qwen3-4b-dense --overwrite",
    )
)(restore)
app.command(
    epilog=examples(
        "svsk diff qwen3-4b-4.30 qwen3-4b-4.45",
        "svsk diff published best --json difference.json",
    )
)(diff)
app.command(
    epilog=examples(
        "svsk push qwen3-4b-svsk me/Qwen3-4B-svsk",
        'svsk push qwen3-4b-svsk me/Qwen3-4B-svsk --private --message "4.45 bits"',
    )
)(push)
