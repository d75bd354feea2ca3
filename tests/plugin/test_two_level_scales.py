# SPDX-License-Identifier: Apache-2.0
"""Scales in two levels (format 1.1) in vLLM's layers: loading, sharding, kernels, refusals."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from svsk_kernels.cpu.cpu_kernel import cpu_ops_obstacle
from svsk_kernels.cpu.processor import has_avx512
from svsk_vllm.format import Codebook, LinearSpec, QuantizedLinear, SvskFormatError, TensorSpec
from svsk_vllm.format.group_scales import ScaleBits
from svsk_vllm.plugin.linear_method import SvskLinearMethod
from tests.support.format_builders import make_group
from tests.support.vllm_layers import (
    LAYERS,
    as_rank,
    build,
    config_of,
    expected_output,
    load,
    output,
    parameters,
    parts_of,
)

CPU = torch.device("cpu")
SCHEMES: list[tuple[int, ScaleBits, Codebook]] = [
    (64, 6, "int4"),
    (16, 8, "quad8"),
    (32, 6, "int4"),
]
"""Group size, bits and codebook. In groups of 64 a rank of two holds two of a row's four 6-bit
codes, which are three bytes."""
BOUND = 5e-3


@pytest.fixture(params=[(0, 1), (1, 2)], ids=["whole", "second of two ranks"])
def rank(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[int, int]]:
    with as_rank(monkeypatch, *request.param):
        yield request.param


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with as_rank(monkeypatch, 0, 1):
        yield


def check(kind: str, linears: list[QuantizedLinear], rank: tuple[int, int]) -> None:
    layer = build(kind, linears, CPU)
    assert layer.weight_scale.dtype == torch.int8
    reference = expected_output(kind, linears, layer, rank)
    layer.quant_method.process_weights_after_loading(layer)
    found = output(layer, CPU)
    assert float((found.double() - reference).norm() / reference.norm()) < BOUND


@pytest.mark.parametrize(
    "kernel",
    [
        "reference",
        "portable",
        pytest.param(
            "fused",
            marks=pytest.mark.skipif(
                cpu_ops_obstacle() is not None, reason="the op for this processor cannot be built"
            ),
        ),
    ],
)
@pytest.mark.parametrize(("group_size", "bits", "codebook"), SCHEMES)
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_is_its_linears(
    monkeypatch: pytest.MonkeyPatch,
    rank: tuple[int, int],
    kind: str,
    group_size: int,
    bits: ScaleBits,
    codebook: Codebook,
    kernel: str,
) -> None:
    monkeypatch.setenv("SVSK_KERNEL", kernel)
    check(kind, parts_of(kind, codebook, group_size, bits), rank)


@pytest.mark.skipif(not has_avx512(), reason="vLLM's 4-bit kernel for CPUs needs AVX-512")
@pytest.mark.parametrize(("group_size", "bits", "codebook"), SCHEMES)
@pytest.mark.parametrize("kind", ["merged", "qkv", "row", "no sidecar"])
def test_layer_in_two_parts(
    monkeypatch: pytest.MonkeyPatch,
    rank: tuple[int, int],
    kind: str,
    group_size: int,
    bits: ScaleBits,
    codebook: Codebook,
) -> None:
    """Without "column", whose 48 rows per rank vLLM's kernel does not take."""
    monkeypatch.setenv("SVSK_KERNEL", "split")
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")  # with AMX it would round activations to 8 bits
    check(kind, parts_of(kind, codebook, group_size, bits), rank)


@pytest.mark.parametrize("kernel", ["auto", "portable", "reference"])
@pytest.mark.parametrize("bits", [8, 6])
def test_weights_are_reloaded(
    monkeypatch: pytest.MonkeyPatch, one_rank: None, kernel: str, bits: ScaleBits
) -> None:
    """By vLLM's own code, which counts what loaders copy and keeps the tensors of kernels."""
    monkeypatch.setenv("SVSK_KERNEL", kernel)
    first = parts_of("qkv", "int4", 64, bits)
    second = [
        QuantizedLinear(a.spec, a.codes.flip(0), a.scale.flip(0), a.u, a.v, a.gain) for a in first
    ]
    layer = build("qkv", first, CPU)
    record_metadata_for_reloading(layer)
    layer.quant_method.process_weights_after_loading(layer)
    before = parameters(layer)
    kept = {name: tensor.data_ptr() for name, tensor in layer.named_parameters()}
    for linears in (second, first):
        initialize_layerwise_reload(layer)
        load("qkv", layer, linears)
        finalize_layerwise_reload(layer, None)
        changed = output(layer, CPU)
        reference = expected_output("qkv", linears, layer, (0, 1))
        assert float((changed.double() - reference).norm() / reference.norm()) < BOUND
    after = parameters(layer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert kept == {name: tensor.data_ptr() for name, tensor in layer.named_parameters()}


@pytest.mark.parametrize("bits", [16, 8, 6])
def test_dummy_weights_are_served(
    monkeypatch: pytest.MonkeyPatch, one_rank: None, bits: ScaleBits
) -> None:
    """vLLM fills what is floating and leaves integers as they are in memory."""
    monkeypatch.setenv("SVSK_KERNEL", "portable")
    with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format="dummy"))):
        layer: Any = LAYERS["merged"][0](config_of(parts_of("merged", "int4", 32, bits)))
    DummyModelLoader(LoadConfig()).load_weights(layer, None)
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.isfinite(output(layer, CPU)).all()


def test_row_scales_that_did_not_arrive_are_named(
    monkeypatch: pytest.MonkeyPatch, one_rank: None
) -> None:
    monkeypatch.setenv("SVSK_KERNEL", "reference")
    layer: Any = LAYERS["qkv"][0](config_of(linears := parts_of("qkv", "int4", 64, 6)))
    load("qkv", layer, linears, lost="m.v_proj.weight_row_scale")
    with pytest.raises(SvskFormatError, match=r"not loaded: m\.v_proj\.weight_row_scale\."):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.fixture
def row_layer(monkeypatch: pytest.MonkeyPatch, one_rank: None) -> Any:
    """A layer of 96 x 256 with 8-bit scales in groups of 64, in bfloat16, nothing loaded."""
    monkeypatch.setenv("SVSK_KERNEL", "reference")
    return LAYERS["row"][0](config_of(parts_of("row", "int4", 64, 8)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({3: 0.75}, r"m\.down_proj\.weight_row_scale: 1 of 96 values have more than 1 significant"),
        ({0: 0.0, 7: float("inf")}, "2 of 96 values are not positive and finite"),
    ],
)
def test_row_scales_that_the_format_does_not_allow_are_refused(
    row_layer: Any, values: dict[int, float], message: str
) -> None:
    rows = torch.ones(96, 1, dtype=torch.bfloat16)
    for row, value in values.items():
        rows[row] = value
    parameter = row_layer.weight_row_scale
    with pytest.raises(SvskFormatError, match=f"{message}.*svsk validate"):
        parameter.weight_loader(parameter, rows)


def test_row_scales_that_the_served_dtype_does_not_hold_are_refused(row_layer: Any) -> None:
    """2^-140 is a subnormal float32; as bfloat16, products with it would be zero."""
    rows = torch.ones(96, 1)
    rows[5] = 2.0**-140
    parameter = row_layer.weight_row_scale
    with pytest.raises(
        SvskFormatError,
        match=r"1 of 96 values are not exact in torch\.bfloat16\. Serve .*torch\.float32 \(--dtype",
    ):
        parameter.weight_loader(parameter, rows)
    parameter.weight_loader(parameter, torch.ones(96, 1))  # other values than these are converted


def test_products_that_overflow_are_refused(row_layer: Any) -> None:
    linear = parts_of("row", "int4", 64, 8)[0]
    load("row", row_layer, [linear])
    row_layer.weight_row_scale.data[2] = 2.0**125
    row_layer.weight_scale.data[2] = torch.tensor([0, -128, 1, -4])
    with pytest.raises(
        SvskFormatError, match=r"m\.down_proj\.weight_scale: 1 of 384 values are not finite"
    ):
        row_layer.quant_method.process_weights_after_loading(row_layer)


@pytest.mark.parametrize(("bits", "columns"), [(8, 3), (6, 6)])
def test_scale_codes_of_another_shape_are_refused(
    monkeypatch: pytest.MonkeyPatch, one_rank: None, bits: ScaleBits, columns: int
) -> None:
    monkeypatch.setenv("SVSK_KERNEL", "reference")
    layer: Any = LAYERS["row"][0](config_of(parts_of("row", "int4", 64, bits)))
    stored = torch.zeros(96, columns, dtype=torch.int8 if bits == 8 else torch.uint8)
    with pytest.raises(
        SvskFormatError,
        match=rf"m\.down_proj\.weight_scale: cannot be unpacked: {bits}-bit .*4 groups\. Run `svsk",
    ) as refused:
        layer.weight_scale.weight_loader(layer.weight_scale, stored)
    assert f"{bits}-bit scale codes: {stored.dtype} [96, {columns}], expected" in str(refused.value)


def test_fused_parts_with_scales_of_other_bits_are_refused() -> None:
    schemes = [make_group(scale_bits=8), make_group(scale_bits=6)]
    with pytest.raises(SvskFormatError, match="scale_bits differ"):
        SvskLinearMethod("m.gate_up_proj", ["gate_proj", "up_proj"], schemes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_row_scale": None}, r"m\.down_proj\.weight_row_scale: missing"),
        (
            {"weight_scale": TensorSpec(torch.bfloat16, (96, 4))},
            r"m\.down_proj\.weight_scale: torch\.bfloat16 .*expected torch\.uint8 \[96, 3\]",
        ),
        (
            {"weight_row_scale": TensorSpec(torch.bfloat16, (96, 2))},
            r"m\.down_proj\.weight_row_scale: torch\.bfloat16 \[96, 2\], expected"
            r".*\. Copy or download the folder again; `svsk validate` lists what is wrong",
        ),
        ({"sidecar_u": TensorSpec(torch.int8, (96, 1, 3))}, r"sidecar_u: unexpected"),
    ],
)
def test_stored_tensors_are_compared_with_the_scheme_before_loading(
    monkeypatch: pytest.MonkeyPatch,
    one_rank: None,
    changes: dict[str, TensorSpec | None],
    message: str,
) -> None:
    refused_before_loading(monkeypatch, 96, changes, message)


def test_a_weight_of_another_model_is_refused_before_loading(
    monkeypatch: pytest.MonkeyPatch, one_rank: None
) -> None:
    message = r"m\.down_proj\.weight_packed: holds a weight of 97 x 256, config\.json asks for 96"
    refused_before_loading(monkeypatch, 97, {}, message)


def refused_before_loading(
    monkeypatch: pytest.MonkeyPatch, rows: int, changes: dict[str, TensorSpec | None], message: str
) -> None:
    spec = LinearSpec("m.down_proj", rows, 256, make_group(targets=["m.down_proj"], scale_bits=6))
    tensors = {k: v for k, v in (spec.tensors() | changes).items() if v is not None}
    headers = {f"m.down_proj.{suffix}": tensor for suffix, tensor in tensors.items()}
    import svsk_vllm.plugin.quantization_config as module

    monkeypatch.setattr(module, "read_headers", lambda model, revision: headers)
    linear = parts_of("no sidecar", "int4", 64, 6)[0]
    config = config_of([QuantizedLinear(spec, linear.codes, linear.scale)])
    config.maybe_update_config("folder")
    with pytest.raises(SvskFormatError, match=message):
        LAYERS["row"][0](config)
