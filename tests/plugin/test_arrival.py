# SPDX-License-Identifier: Apache-2.0
"""What arrives at the layers: all of it, as it was stored, rows in their order."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from svsk_vllm.format import SvskFormatError
from svsk_vllm.plugin.arrival import LinearRecord, expect
from svsk_vllm.plugin.row_order import stored_row_order
from svsk_vllm.plugin.sidecar_layout import build_layout
from svsk_vllm.plugin.sidecar_loader import Arrived, StoredBase, base_loader, tile_loader
from tests.support.format_builders import make_group


def test_what_did_not_arrive_is_named_and_counts_start_anew() -> None:
    arrived = Arrived({"q": "m.q_proj", "k": "m.k_proj"}, [make_group(rank=4), make_group(rank=0)])
    for _ in range(2):
        for name in ("weight_packed", "weight_scale"):
            arrived.note(name, ("q", "k"))
        arrived.note("sidecar_u", ("q",))
        arrived.note("sidecar_v", ("q",))
        with pytest.raises(
            SvskFormatError,
            match=r"m\.qkv_proj: not loaded: m\.q_proj\.sidecar_gain\. .* or does not fit its",
        ):
            arrived.check("m.qkv_proj")


@pytest.mark.parametrize(
    "settings",
    [
        {"new_decoder_architecture": False, "multi_query": False},
        {"new_decoder_architecture": False, "multi_query": True},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ],
)
def test_falcon_rows_are_followed(settings: dict[str, Any]) -> None:
    """Queries first, then keys, then values, from rows stored by groups of heads."""
    from transformers import FalconConfig

    config = FalconConfig(hidden_size=32, num_attention_heads=4, **settings)
    groups = (
        {False: 4, True: 1}[config.multi_query]
        if not config.new_decoder_architecture
        else config.num_kv_heads
    )
    rows = torch.arange((4 + 2 * groups) * 8).view(groups, 4 // groups + 2, 8)
    expected = torch.cat([rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()])
    found = stored_row_order(
        "FalconForCausalLM", config, "h.0.self_attention.query_key_value", len(expected)
    )
    assert found is not None
    assert torch.equal(found, expected)
    assert (
        stored_row_order("LlamaForCausalLM", config, "model.layers.0.self_attn.q_proj", 8) is None
    )


class _Fused(torch.nn.Module):
    """A model whose loader moves rows, splits, or passes on what it is given."""

    def __init__(
        self, change: Callable[[torch.Tensor], torch.Tensor], order: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.change, self.config, self.suffix = change, None, "weight_packed"
        self.load: Callable[..., None]
        self.layer = torch.nn.Module()
        self.layer.weight_packed = torch.nn.Parameter(
            torch.zeros(8, 2, dtype=torch.int32), requires_grad=False
        )
        self.layer.norm = torch.nn.Parameter(torch.zeros(2))
        self.arrived = Arrived({None: "layer"}, [make_group(rank=0)])
        self.load = base_loader(
            "layer",
            "weight_packed",
            lambda param, w: param.data.copy_(w),
            self.arrived,
            order,
            StoredBase(make_group().weights, 1),
            keep=True,
            whole=True,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            if name.endswith(self.suffix):
                self.load(getattr(self.layer, self.suffix), self.change(tensor))
            loaded.add(name)
        return loaded


def observed_model(
    change: Callable[[torch.Tensor], torch.Tensor], order: torch.Tensor | None = None
) -> Any:
    model = _Fused(change, order)
    layer = model._modules.pop("layer")
    assert layer is not None
    expect(layer, LinearRecord((None,), frozenset({"weight_packed"})))
    model.layer = layer  # the registration is what is observed
    return model


WORDS = torch.arange(16, dtype=torch.int32).view(8, 2)


@pytest.mark.parametrize(
    ("change", "order", "right"),
    [
        (lambda t: t, None, True),
        (lambda t: t.clone(), None, True),
        (lambda t: t.flip(0), None, False),
        (lambda t: t.flip(0), torch.arange(8).flip(0), True),
        (lambda t: t, torch.arange(8).flip(0), False),
        (lambda t: t[:4].repeat(2, 1), None, False),
    ],
)
def test_rows_that_a_model_moves_are_noticed(
    change: Any, order: torch.Tensor | None, right: bool
) -> None:
    model = observed_model(change, order)
    weights = [("layer.weight_packed", WORDS.clone()), ("layer.norm", torch.ones(2))]
    if right:
        assert model.load_weights(iter(weights)) == {name for name, _ in weights}
    else:
        with pytest.raises(
            SvskFormatError, match=r"layer\.weight_packed: vLLM's loader .* changes its rows"
        ):
            model.load_weights(iter(weights))


def test_codes_of_another_dtype_are_refused() -> None:
    model = observed_model(lambda t: t)
    message = (
        r"weight_packed: values of dtype torch\.int64, expected torch\.int32\. Run `svsk validate"
    )
    with pytest.raises(SvskFormatError, match=message):
        model.load_weights(iter([("layer.weight_packed", WORDS.long())]))


def test_a_sidecar_that_a_model_changes_is_refused() -> None:
    scheme = make_group(rank=4, tile_m=16, tile_n=32, group_size=32)
    layout = build_layout(
        "layer", [(None, scheme)], lambda _: torch.arange(32), lambda _: torch.arange(64), 64, 32
    )
    assert layout is not None
    model = observed_model(lambda t: t.flip(0))
    model.suffix, model.load = "sidecar_gain", tile_loader("layer", "sidecar_gain", layout, 64)
    model.layer.sidecar_gain = torch.nn.Parameter(layout.plan.zeros()[2], requires_grad=False)
    gain = torch.arange(16.0).view(2, 2, 4)
    message = (
        r"layer\.sidecar_gain: vLLM's loader for this architecture changes it before layer gets it"
        r"\. Quantise the module without a sidecar"
    )
    with pytest.raises(SvskFormatError, match=message):
        model.load_weights(iter([("layer.sidecar_gain", gain)]))


def test_a_dense_tensor_that_nothing_fills_is_named() -> None:
    model = observed_model(lambda t: t)
    model.bare = torch.nn.LayerNorm(2, bias=False)
    with pytest.raises(SvskFormatError, match=r"lacks what vLLM loads into bare\.weight\."):
        model.load_weights([("layer.weight_packed", WORDS.clone()), ("layer.norm", torch.ones(2))])
