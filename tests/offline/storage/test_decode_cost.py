# SPDX-License-Identifier: Apache-2.0
"""What the summary of ``svsk quantize`` says of groups finer than 64 weights."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from svsk_kernels.gpu.predicted_time import GPUS
from svsk_offline.storage import decode_cost
from svsk_offline.storage.decode_cost import finer_groups, finer_groups_line
from svsk_vllm.format.config import ConfigGroup, SidecarArgs, WeightArgs


def costs(monkeypatch: pytest.MonkeyPatch, *schemes: ConfigGroup) -> dict[str, float]:
    linears = {
        str(i): SimpleNamespace(n=9728, k=2560, scheme=scheme) for i, scheme in enumerate(schemes)
    }
    monkeypatch.setattr(decode_cost, "Contents", lambda folder: SimpleNamespace(linears=linears))
    return finer_groups(Path("any"))


def scheme(group_size: int, scale_bits: int, rank: int = 0) -> ConfigGroup:
    weights = WeightArgs.model_validate({"group_size": group_size, "scale_bits": scale_bits})
    return ConfigGroup(targets=("Linear",), weights=weights, sidecar=SidecarArgs(rank=rank))


def test_groups_of_64_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table = WeightArgs(num_bits=8, codebook="int8", group_size=32)
    head = ConfigGroup(targets=("Linear",), weights=table)
    assert costs(monkeypatch, scheme(64, 16), scheme(64, 6, 32), head) == {}
    assert finer_groups_line({}) is None


def test_finer_groups_cost_bytes_and_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    one_level, two_levels = costs(monkeypatch, scheme(16, 16)), costs(monkeypatch, scheme(16, 6))
    mixed = costs(monkeypatch, scheme(16, 16), scheme(64, 16))
    for gpu in GPUS:
        assert 0 < two_levels[gpu] < one_level[gpu]
        assert mixed[gpu] == pytest.approx(one_level[gpu] / 2)


def test_the_summary_names_gpus_over_a_twentieth() -> None:
    line = finer_groups_line({"A100": 0.07, "H100": 0.05, "B200": 0.121})
    assert line == (
        "groups finer than 64: decoding is predicted to take 7% on A100, 12% on B200 longer than"
        " with groups of 64"
    )
    assert finer_groups_line({"A100": 0.01}) is None
