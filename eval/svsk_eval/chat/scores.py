# SPDX-License-Identifier: Apache-2.0
"""The scores of a model on its reference's answers, as a file keeps them; without torch.

:mod:`svsk_eval.chat.metrics` says what each series is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, field_validator

from svsk_eval.text.series import FloatArray, mean_se

__all__ = ["SERIES", "ChatScores", "Figure"]

_OVER_TOKENS: Final = ("nll", "ref_nll", "kl", "top1", "early_end", "ref_early_end")
_AT_THE_END: Final = ("end_kl", "end_probability", "ref_end_probability")
SERIES: Final = (*_OVER_TOKENS, *_AT_THE_END)


@dataclass(frozen=True)
class Figure:
    """A mean over prompts.

    Attributes:
        mean: of all prompts that have the figure.
        se: its standard error; None with one prompt.
    """

    mean: float
    se: float | None


class ChatScores(BaseModel):
    """What ``svsk eval --chat --json`` writes of the answers under ``chat``.

    Attributes:
        answers_fingerprint: SHA-256 of the tokens of all prompts and answers, and of their numbers.
        prompts: how many, P.
        finished: how many of the answers ended by themselves.
        answer_tokens: most tokens of an answer, its end included.
        tokens: tokens of all answers, without their ends.
        per_prompt: figures by name, P each, see
            :mod:`svsk_eval.chat.metrics`; None where an answer has no
            end or no tokens. KL and NLL are in nats per token, the others 0 to 1.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    answers_fingerprint: str
    prompts: int
    finished: int
    answer_tokens: int
    tokens: int
    per_prompt: Mapping[str, tuple[float | None, ...]]

    @field_validator("per_prompt")
    @classmethod
    def _complete(cls, series: Mapping[str, tuple[float | None, ...]]) -> Any:
        if not set(SERIES) <= set(series) or len(set(map(len, series.values()))) != 1:
            raise ValueError(f"expected {', '.join(SERIES)}, as many values in every one")
        return series

    @property
    def series(self) -> dict[str, FloatArray]:
        """The figures per prompt and ``delta_nll``, float64 [P] each, NaN where there is none."""
        series = {name: np.array(values, np.float64) for name, values in self.per_prompt.items()}
        return {**series, "delta_nll": series["nll"] - series["ref_nll"]}

    def figures(self) -> dict[str, Figure]:
        """Mean and standard error of each series that any prompt has."""
        known = {name: values[~np.isnan(values)] for name, values in self.series.items()}
        return {
            name: Figure(float(values.mean()), mean_se(values[:, None]))
            for name, values in known.items()
            if len(values)
        }

    def to_json(self) -> dict[str, Any]:
        """What ``json`` can write: the fields, and each figure with its standard error."""
        flat: dict[str, Any] = {}
        for name, figure in self.figures().items():
            flat |= {name: figure.mean, f"{name}_se": figure.se}
        fields = self.model_dump(mode="json")
        per_prompt = fields.pop("per_prompt")
        return {**flat, **fields, "per_prompt": per_prompt}
