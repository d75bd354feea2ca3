# SPDX-License-Identifier: Apache-2.0
"""The scale of a layer's inputs is a matter of units.

The same codes come out, and unused channels cost nothing.
"""

import pytest
import torch

from svsk_offline.calibration import InputStatistics
from svsk_offline.planning.bit_budget import allocate
from svsk_offline.quantizers.quantize_linear import quantize_linear
from svsk_offline.quantizers.row_metric import RowMetric
from svsk_offline.recipe import AllocationArgs, AlternatingArgs, load_recipe
from svsk_vllm.format import ConfigGroup, LinearSpec, QuantizedLinear, dequantize
from tests.offline.planning.choices import choices_of
from tests.offline.quantizers.correlated import inputs
from tests.offline.quantizers.test_quantizers import weight
from tests.support.format_builders import make_group

N, K = 48, 256
DEAD = slice(0, K, 16)


def gathered(x: torch.Tensor) -> InputStatistics:
    found = InputStatistics(x.shape[-1], torch.device("cpu"), full=True, first=True)
    found.add(x)
    return found


def sample(dead: bool = True) -> torch.Tensor:
    """Inputs [samples, tokens, K] of root mean square near 1.

    With ``dead``, a channel in 16 is zero, a tile too.
    """
    x = inputs(K).view(6, 100, K).clone()
    if dead:
        x[..., DEAD] = 0
        x[..., :96] = 0
    return x


def quantized(x: torch.Tensor, recipe: str, w: torch.Tensor | None = None) -> QuantizedLinear:
    chosen = load_recipe(recipe).override({"sidecar": {"rank": 4, "tile_m": 20, "tile_n": 96}})
    scheme = ConfigGroup(targets=("Linear",), weights=chosen.weights, sidecar=chosen.sidecar)
    metric = None
    if recipe == "best":
        directions = torch.randn(3, N, generator=torch.Generator().manual_seed(1))
        metric = RowMetric(torch.linspace(0.5, 2, N), directions)
    w = weight(N, K) if w is None else w
    return quantize_linear(
        "model.layers.0.self_attn.q_proj", w, gathered(x), chosen, scheme, torch.bfloat16, metric
    )


@pytest.mark.parametrize("recipe", ["published", "fast", "best"])
@pytest.mark.parametrize("dead", [False, True])
def test_codes_do_not_depend_on_the_scale_of_the_inputs(recipe: str, dead: bool) -> None:
    plain = quantized(sample(dead), recipe)
    for power in (-20, -10, 10, 20):
        other = quantized(sample(dead) * 2.0**power, recipe)
        assert torch.equal(other.codes, plain.codes)
        assert torch.equal(other.scale, plain.scale)
        # A power of two may go from one factor's scale to the other's: what they stand for together
        # is the same.
        assert torch.equal(dequantize(other), dequantize(plain))
    # Which rounds, so near ties fall otherwise, error feedback carries them on, and of rounds that
    # end alike another one may be the best.
    rows = sample(dead).flatten(0, 1)

    def error(linear: QuantizedLinear) -> float:
        return float((rows @ (weight(N, K) - dequantize(linear)).T).square().sum())

    for factor in (1e-3, 1e3):
        other = quantized(sample(dead) * factor, recipe)
        if recipe == "published":
            assert torch.equal(other.codes, plain.codes)
        assert error(other) == pytest.approx(error(plain), rel=0.05)


@pytest.mark.parametrize("recipe", ["published", "fast", "best"])
@pytest.mark.parametrize("rms", [0.03, 30.0])
def test_channels_never_used_cost_the_others_nothing(recipe: str, rms: float) -> None:
    """Their weights are not outliers.

    The error of what is used is that without them, whatever the inputs' scale.
    """
    x = sample(dead=False) * rms
    used = x.clone()
    used[..., DEAD] = 0
    errors = []
    for data in (x, used):
        rows = used.flatten(0, 1)  # the same inputs judge both
        left = rows @ (weight(N, K) - dequantize(quantized(data, recipe))).T
        errors.append(float(left.square().sum() / (rows @ weight(N, K).T).square().sum()))
    assert errors[1] < 1.1 * errors[0]


def test_a_bit_budget_is_spent_the_same_whatever_the_unit_of_the_losses() -> None:
    rows = 0.5 + torch.rand(N, generator=torch.Generator().manual_seed(0))
    spec = LinearSpec("m", N, K, make_group(tile_m=0, tile_n=96, num_bits=4))
    args = AllocationArgs(target_bpw=5, ranks=(0, 2, 4, 8))

    def spent(factor: float) -> list[tuple[int, int, int]]:
        choices = {
            name: choices_of(
                weight(N, K, seed),
                gathered(sample() * factor).hessian,
                rows * (seed + 1),
                spec,
                AlternatingArgs(),
                args,
            )
            for seed, name in enumerate(("a", "b", "c"))
        }
        chosen = allocate(choices, {name: name for name in choices}, 5.0, 3 * N * K)
        return [(c.group_size, c.rank, c.factor_bits) for c in chosen.values()]

    plain = spent(1.0)
    assert len(set(plain)) > 1
    assert all(spent(2.0**power) == plain for power in (-30, -10, 10, 30))


def test_a_column_tile_that_is_never_used_takes_no_share_of_the_error() -> None:
    """Its own Hessian is zero; a unit in its place would outweigh tiles whose inputs are small."""
    x = sample(dead=False) * 1e-3
    x[..., :96] = 0
    spec = LinearSpec("m", N, K, make_group(tile_m=0, tile_n=96, num_bits=4))
    choices = choices_of(
        weight(N, K),
        gathered(x).hessian,
        torch.ones(N),
        spec,
        AlternatingArgs(rounds=1),
        AllocationArgs(target_bpw=5, ranks=(0, 16)),
    )
    without, with_sidecar = (c.loss for c in choices if c.group_size == 64)
    assert with_sidecar < 0.8 * without
