# SPDX-License-Identifier: Apache-2.0
"""The README.md of a checkpoint."""

from collections.abc import Sequence

from svsk_offline.layer import LayerReport
from svsk_vllm.format import SvskCheckpointConfig

__all__ = ["model_card"]

_TEMPLATE = """
# {name}, quantised with SVSK

4-bit weights with a tile-local low-rank sidecar: **{bpw:.3f} bits per weight** over {count} quantised linear layers
(every stored bit counted). Recipe `{recipe}`, calibrated on `{source}` ({samples} x {seq_len} tokens).

## Use

```
pip install svsk-vllm
vllm serve THIS_FOLDER --quantization svsk
```

With transformers (dequantised when loaded): `import svsk_vllm.hf`, then `AutoModelForCausalLM.from_pretrained(...)`.

## Error by layer kind

Relative error of the weights, weighted by the energy of the input channels, mean over the blocks.

| layer | layers | bits per weight | base alone | with sidecar |
| --- | --- | --- | --- | --- |
{rows}
"""


def model_card(name: str, config: SvskCheckpointConfig, layers: Sequence[LayerReport]) -> str:
    """Markdown with Hugging Face metadata.

    Args:
        name: of the original model.
        config: of the checkpoint.
        layers: reports of the quantised linears, at least one.
    """
    from huggingface_hub import ModelCard, ModelCardData

    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    rows = []
    for kind, found in kinds.items():
        bits = sum(layer.stored_bits for layer in found) / sum(layer.num_weights for layer in found)
        base = sum(layer.base_error for layer in found) / len(found)
        error = sum(layer.error for layer in found) / len(found)
        rows.append(f"| {kind} | {len(found)} | {bits:.3f} | {base:.2e} | {error:.2e} |")
    calibration = config.producer["calibration"]
    text = _TEMPLATE.format(
        name=name,
        bpw=sum(layer.stored_bits for layer in layers) / sum(layer.num_weights for layer in layers),
        count=len(layers),
        recipe=config.producer["recipe"],
        source=calibration["source"],
        samples=calibration["samples"],
        seq_len=calibration["seq_len"],
        rows="\n".join(rows),
    )
    data = ModelCardData(library_name="svsk-vllm", pipeline_tag="text-generation", tags=["svsk", "quantized", "vllm"])
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))
