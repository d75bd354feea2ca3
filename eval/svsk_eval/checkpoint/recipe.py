# SPDX-License-Identifier: Apache-2.0
"""The recipe that a checkpoint's config.json records, as YAML."""

from typing import Any, Final

import yaml

from svsk_eval.checkpoint.contents import CheckpointContents

__all__ = ["recipe_yaml"]

_LONGEST: Final = 20_000
"""Characters; recipes have about 1,000. Anybody may have written the file."""


class _Short(yaml.SafeDumper):
    """Writes every value out where it stands: no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def recipe_yaml(contents: CheckpointContents) -> str | None:
    """Every value of the recipe that had an effect; None where config.json has none."""
    if not contents.recipe:
        return None
    text = yaml.dump(
        {"name": str(contents.producer.get("recipe", "unknown")), **contents.recipe},
        Dumper=_Short,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=100,
    )
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}\n# the rest is left out"
