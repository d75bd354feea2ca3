# SPDX-License-Identifier: Apache-2.0
"""The README.md of a checkpoint."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from svsk_offline.storage.card_figures import BEGIN, END
from svsk_offline.storage.layer_report import LayerReport, bits_per_weight, thin_experts
from svsk_vllm.format import SvskCheckpointConfig, SvskFormatError
from svsk_vllm.format.files import open_regular, read_json

__all__ = ["Origin", "model_card"]

_CARRIED: Final = ("license", "license_name", "license_link", "language", "pipeline_tag")
_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MAX_CARD: Final = 1 << 20

_OUR_TAGS: Final = ("svsk", "quantized", "vllm")

_TEMPLATE: Final = """
# {name}, quantised with SVSK

4-bit weights with a tile-local low-rank sidecar: **{bpw:.3f} bits per weight** \
over {count} quantised linear layers, \
{whole:.3f} over all weights of the model (every stored bit counted); {megabytes:,.1f} MB.
Recipe `{recipe}`, calibrated on `{source}` ({samples} x {seq_len} tokens).

## Use

Stock transformers does not know these weights: `import svsk_vllm.hf` (package `svsk-vllm`) \
before you load them. vLLM
serves them where that package is installed.

```
pip install svsk-vllm
vllm serve THIS_FOLDER --quantization svsk
```

With transformers (dequantised when loaded): `import svsk_vllm.hf`, then \
`AutoModelForCausalLM.from_pretrained(...)`. Without that import transformers, PEFT and lm-eval stop
with a note. For what reads neither, `svsk export` writes an ordinary dense folder, W4A16 or GGUF.

{begin}
{end}

## Error by layer kind

Squared error of the layers' outputs over their squares, {tokens}, mean \
over the blocks.{tables}

| layer | layers | bits per weight | base alone | with sidecar |
| --- | --- | --- | --- | --- |
{rows}
"""

_THIN: Final = """
## Experts with little calibration text

Fewer tokens were routed to these experts, by number, than one of their matrices has inputs; what
was missing was taken from the tokens of the layer's other experts. In brackets their own tokens.

"""


@dataclass(frozen=True)
class Origin:
    """The dense model a checkpoint is made from.

    Attributes:
        name: for people.
        base_model: hub ids, empty where none is known.
        carried: metadata of its card that holds for the checkpoint too: licence, language, task,
            tags.
    """

    name: str
    base_model: tuple[str, ...]
    carried: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> "Origin":
        """What a folder says of itself: a hub cache by its path, others by card and config."""
        card = _card_metadata(folder / "README.md")
        carried = {key: card[key] for key in _CARRIED if card.get(key)}
        tags = card.get("tags")
        if isinstance(tags, list):
            carried["tags"] = [tag for tag in tags if isinstance(tag, str) and tag.isprintable()]
        hub_id = _hub_id(folder.absolute())
        if hub_id:
            return cls(hub_id, (hub_id,), carried)
        declared = card.get("base_model")
        declared = [declared] if isinstance(declared, str) else declared
        named = declared if isinstance(declared, list) else []
        path = read_json(folder / "config.json").get("_name_or_path")
        hub_ids = tuple(
            name for name in named or [path] if isinstance(name, str) and _ID.fullmatch(name)
        )
        return cls(folder.resolve().name, hub_ids, carried)


def _hub_id(folder: Path) -> str | None:
    """``org/name`` of a folder ``models--org--name/snapshots/REVISION``."""
    holder = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not holder.startswith("models--"):
        return None
    return holder.removeprefix("models--").replace("--", "/")


def _card_metadata(path: Path) -> dict[str, Any]:
    """Metadata of a card; empty where there is none or it cannot be read."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        with open_regular(path) as handle:
            text = handle.read(_MAX_CARD).decode("utf-8", errors="replace")
        return (
            dict(vars(ModelCard(text, ignore_metadata_errors=True).data))
            if text.startswith("---")
            else {}
        )
    except (SvskFormatError, YAMLError, ValueError, TypeError):
        return {}


def model_card(
    origin: Origin,
    config: SvskCheckpointConfig,
    layers: Sequence[LayerReport],
    tables: Sequence[LayerReport] = (),
    *,
    whole: float,
    size: int,
) -> str:
    """Markdown with Hugging Face metadata.

    Args:
        origin: the original model.
        config: of the checkpoint.
        layers: reports of the quantised linears of the blocks, at least one.
        tables: of embedding and output head, where they are quantised.
        whole: bits per weight over all weights of the model.
        size: bytes of the weight files.
    """
    from huggingface_hub import ModelCard, ModelCardData

    kinds: dict[str, list[LayerReport]] = {}
    for layer in (*layers, *tables):
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    rows = []
    for kind, reports in kinds.items():
        base = _mean(layer.base_error for layer in reports)
        error = _mean(layer.error for layer in reports)
        bits = bits_per_weight(reports)
        rows.append(f"| {kind} | {len(reports)} | {bits:.3f} | {base} | {error} |")
    calibration = config.producer["calibration"]
    text = _TEMPLATE.format(
        name=origin.name,
        bpw=bits_per_weight(layers),
        count=len(layers),
        whole=whole,
        megabytes=size / 1e6,
        begin=BEGIN,
        end=END,
        recipe=config.producer["recipe"],
        source=calibration["source"],
        samples=calibration["samples"],
        seq_len=calibration["seq_len"],
        rows="\n".join(rows),
        tables=" The bits per weight above are the blocks'; embedding and head come on top."
        if tables
        else "",
        tokens="on calibration tokens that were held out"
        if all(layer.held_out_tokens for layer in layers if layer.error is not None)
        else "on the calibration tokens that were fitted",
    )
    if thin := thin_experts(layers):
        text += _THIN + "\n".join(f"- {line}" for line in thin) + "\n"
    values: dict[str, Any] = {"pipeline_tag": "text-generation", **origin.carried}
    tags = list(dict.fromkeys((*_OUR_TAGS, *values.pop("tags", ()))))
    if origin.base_model:
        values |= {"base_model": list(origin.base_model), "base_model_relation": "quantized"}
    data = ModelCardData(library_name="svsk-vllm", tags=tags, **values)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))


def _mean(errors: Iterable[float | None]) -> str:
    """The mean of those that were measured."""
    known = [error for error in errors if error is not None]
    return f"{sum(known) / len(known):.2e}" if known else "not measured"
