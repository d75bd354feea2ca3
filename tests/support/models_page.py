# SPDX-License-Identifier: Apache-2.0
"""The table of docs/models.md, made of what the tool says of a tiny model of each family.

python -m tests.support.models_page     # writes it into the page
"""

import tempfile
from pathlib import Path
from typing import Final

import torch

from svsk_offline.export.gguf.families import FAMILIES as GGUF_FAMILIES
from svsk_offline.planning.plan import uniform_schemes
from svsk_offline.planning.serving import bases_alone, check_servable, dense_matrices, vllm_class_of
from svsk_offline.recipe import USUAL_IGNORE
from svsk_offline.storage.dense_model import ModelSource
from svsk_vllm.format import SvskCheckpointConfig
from svsk_vllm.format.experts import expert_layers
from tests.support.tiny_models import (
    EXPERT_FAMILIES,
    FAMILIES,
    HYBRID_FAMILIES,
    MORE_FAMILIES,
    scheme,
    write_dense,
)

__all__ = ["MARKS", "PAGE", "page_rows", "written_rows"]

PAGE: Final = Path(__file__).parents[2] / "docs" / "models.md"
MARKS: Final = ("<!-- models -->\n", "<!-- end of models -->\n")
_HEAD: Final = (
    "| family (`model_type`) | quantise | vLLM | transformers | GGUF | stays dense in the blocks |",
    "| --- | --- | --- | --- | --- | --- |",
)
NOT_SERVED: Final = ("qwen3_5",)
"""What no engine has served yet: vLLM's module needs torchvision, which the set-up leaves out."""
_SERVED: Final = {"native": "its own class", "transformers": "transformers' class"}


def page_rows(folder: Path) -> list[str]:
    """Lines of the table.

    Args:
        folder: for the models.
    """
    known = FAMILIES | MORE_FAMILIES | EXPERT_FAMILIES | HYBRID_FAMILIES
    rows: dict[str, str] = {}
    for name, family in known.items():
        source = ModelSource(write_dense(folder / name, name))
        served = name not in NOT_SERVED
        rows.setdefault(_row(source, family.model_type, served=served), "")
    return [*_HEAD, *rows]


def _row(source: ModelSource, model_type: str, *, served: bool) -> str:
    source.check()
    linears = list(source.block_linears())
    reason = bases_alone(source, linears)
    config = SvskCheckpointConfig(
        config_groups={"all": scheme("Linear", rank=0 if reason else 2)}, ignore=USUAL_IGNORE
    )
    schemes = uniform_schemes(source, config, torch.bfloat16)
    check_servable(source, schemes)
    dense = [name.removeprefix("model.layers.*.") for name in dense_matrices(source, schemes)]
    experts = bool(expert_layers(schemes))
    gguf = "yes" if model_type in GGUF_FAMILIES else "refused" if experts else "with a template"
    cells = (
        f"`{model_type}`",
        "yes, without a sidecar" if reason else "yes",
        _SERVED[vllm_class_of(source).support] + (", on CPUs" if experts else "")
        if served
        else "not tried",
        "yes",
        gguf,
        ", ".join(f"`{name}`" for name in dense) or "nothing",
    )
    return f"| {' | '.join(cells)} |"


def written_rows() -> list[str]:
    """Lines of the table in the page."""
    text = PAGE.read_text(encoding="utf-8")
    return text.partition(MARKS[0])[2].partition(MARKS[1])[0].splitlines()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        made = "\n".join(page_rows(Path(temporary)))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}{made}\n{MARKS[1]}{after}", encoding="utf-8")
