# SPDX-License-Identifier: Apache-2.0
"""Quantised embeddings and output heads in vLLM's layers: choice, loading, sharding, refusals."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import vllm.model_executor.layers.vocab_parallel_embedding as vllm_vocabulary
from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

import svsk_vllm
import svsk_vllm.plugin.quantization_config as quantization_config
from svsk_kernels.cpu.cpu_kernel import cpu_ops_obstacle
from svsk_vllm.format import (
    Codebook,
    LinearSpec,
    QuantizedLinear,
    SvskFormatError,
    TensorSpec,
    dequantize,
)
from svsk_vllm.plugin.quantization_config import SvskConfig
from svsk_vllm.plugin.table_method import SvskHeadMethod, SvskTableMethod, TiedHeadMethod
from tests.support.format_builders import EMBEDDING, HEAD, make_group, random_linear
from tests.support.vllm_layers import as_rank

VOCABULARY, K = 150, 128  # vLLM pads it to 192: each of two ranks holds 96, the second 54 rows
BLOCK_LINEAR = "model.layers.0.mlp.up_proj"
BOUND = 5e-3
KERNELS = [
    "reference",
    "portable",
    pytest.param(
        "fused",
        marks=pytest.mark.skipif(
            cpu_ops_obstacle() is not None, reason="the op for this processor cannot be built"
        ),
    ),
]


@pytest.fixture(params=[(0, 1), (0, 2), (1, 2)], ids=["whole", "first of two", "second of two"])
def rank(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[int, int]]:
    yield from ranked(monkeypatch, *request.param)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    yield from ranked(monkeypatch, 0, 1)


def ranked(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> Iterator[tuple[int, int]]:
    svsk_vllm.register()
    monkeypatch.setattr(vllm_vocabulary, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(vllm_vocabulary, "get_tensor_model_parallel_world_size", lambda: size)
    with as_rank(monkeypatch, rank, size):
        yield rank, size


Kind = Codebook | Literal["hot rows"]
HOT = 70  # more than the second of two ranks has rows


def table(name: str, kind: Kind, seed: int = 0) -> QuantizedLinear:
    scheme = {
        "int8": make_group(targets=[name], codebook="int8", group_size=32),
        "hot rows": make_group(targets=[name], group_size=32, hot_rows=HOT),
        "quad8": make_group(
            targets=[name],
            codebook="quad8",
            scale_bits=6,
            rank=4,
            tile_m=0,
            tile_n=48,
            num_bits=4,
        ),
    }[kind]
    return random_linear(LinearSpec(name, VOCABULARY, K, scheme, torch.bfloat16), seed)


def config_with(
    monkeypatch: pytest.MonkeyPatch,
    *linears: QuantizedLinear,
    tied: bool = False,
    declared: bool = True,
    dense: tuple[str, ...] = (),
) -> SvskConfig:
    """A config whose checkpoint stores these; it becomes vLLM's current one."""
    names = [linear.spec.name for linear in linears]
    groups = {
        str(number): linear.spec.scheme.model_dump(mode="json")
        for number, linear in enumerate(linears)
    } | {"blocks": {"targets": ["Linear"]}}
    raw = {"quant_method": "svsk", "version": "1.1", "config_groups": groups}
    if declared and EMBEDDING in names:
        raw["embedding"] = {"module": EMBEDDING, "tied": tied}
    config = SvskConfig.from_config(raw)
    headers: dict[str, Any] = {
        f"{BLOCK_LINEAR}.{suffix}": spec
        for suffix, spec in LinearSpec(BLOCK_LINEAR, VOCABULARY, K, make_group()).tensors().items()
    }
    for linear in linears:
        specs = linear.spec.tensors()
        headers |= {f"{linear.spec.name}.{suffix}": spec for suffix, spec in specs.items()}
    for name in dense:
        headers[f"{name}.weight"] = SimpleNamespace(dtype=torch.bfloat16, shape=(VOCABULARY, K))
    monkeypatch.setattr(quantization_config, "read_headers", lambda model, revision: headers)
    config.maybe_update_config("folder")
    get_current_vllm_config().quant_config = config
    return config


def load(layer: Any, linear: QuantizedLinear) -> None:
    for name, tensor in linear.to_tensors().items():
        parameter = getattr(layer, name.rpartition(".")[2])
        parameter.weight_loader(parameter, tensor)


def held(linear: QuantizedLinear, rank: tuple[int, int]) -> torch.Tensor:
    """``W_hat`` of the rows that a rank holds, rows of zeros for those that pad it."""
    padded = -(-VOCABULARY // 64) * 64
    weight = torch.zeros(padded, K)
    weight[:VOCABULARY] = dequantize(linear)
    return weight.unflatten(0, (rank[1], -1))[rank[0]]


def check_product(layer: Any, weight: torch.Tensor) -> None:
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(3)).bfloat16()
    y = layer.quant_method.apply(layer, x)
    expected = x.float() @ weight.T
    assert y.dtype == torch.bfloat16
    assert float((y.float() - expected).norm() / expected.norm()) < BOUND


def check_rows(layer: Any, weight: torch.Tensor, rank: tuple[int, int]) -> None:
    last = min(len(weight), VOCABULARY - rank[0] * len(weight)) - 1
    ids = torch.tensor([[0, last, 7], [7, 16, 33]])
    rows = layer.quant_method.embedding(layer, ids)
    assert (rows.shape, rows.dtype) == ((2, 3, K), torch.bfloat16)
    torch.testing.assert_close(rows, weight[ids].bfloat16(), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["int8", "quad8", "hot rows"])
def test_a_tied_table_is_looked_up_and_multiplied(
    monkeypatch: pytest.MonkeyPatch, rank: tuple[int, int], kind: Kind, kernel: str
) -> None:
    """As in Llama: the embedding is built without a name, the head is tied to it."""
    monkeypatch.setenv("SVSK_KERNEL", kernel)
    linear = table(EMBEDDING, kind)
    config = config_with(monkeypatch, linear, tied=True)
    embedding: Any = VocabParallelEmbedding(
        VOCABULARY, K, params_dtype=torch.bfloat16, quant_config=config
    )
    head: Any = ParallelLMHead(VOCABULARY, K, quant_config=config, prefix="lm_head")
    assert isinstance(embedding.quant_method, SvskTableMethod)
    assert isinstance(head.quant_method, TiedHeadMethod)
    assert dict(head.named_parameters()) == {}
    load(embedding, linear)
    embedding.quant_method.process_weights_after_loading(embedding)
    assert head.tie_weights(embedding) is embedding
    assert embedding.bias is None, "some of vLLM's classes ask a head for it"
    weight = held(linear, rank)
    check_rows(embedding, weight, rank)
    check_product(embedding, weight)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["int8", "quad8", "hot rows"])
def test_a_head_of_its_own(
    monkeypatch: pytest.MonkeyPatch, rank: tuple[int, int], kind: Kind, kernel: str
) -> None:
    monkeypatch.setenv("SVSK_KERNEL", kernel)
    linear = table(HEAD, kind)
    config = config_with(monkeypatch, linear, table(EMBEDDING, "int8", 1))
    head: Any = ParallelLMHead(
        VOCABULARY, K, params_dtype=torch.bfloat16, quant_config=config, prefix="lm_head"
    )
    assert type(head.quant_method) is SvskHeadMethod
    load(head, linear)
    head.quant_method.process_weights_after_loading(head)
    check_product(head, held(linear, rank))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["int8", "quad8", "hot rows"])
def test_lookups_and_products_compile_for_any_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch, one_rank: Any, kind: Kind, kernel: str
) -> None:
    """Into one graph, as vLLM compiles a model's embedding."""
    monkeypatch.setenv("SVSK_KERNEL", kernel)
    linear = table(EMBEDDING, kind)
    config_with(monkeypatch, linear, tied=True)
    layer = build_embedding(torch.bfloat16)
    load(layer, linear)
    layer.quant_method.process_weights_after_loading(layer)

    def run(ids: torch.Tensor) -> torch.Tensor:
        return layer.quant_method.apply(layer, layer.quant_method.embedding(layer, ids))

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for count in (2, 5):
        ids = torch.arange(count) * 7
        assert torch.equal(compiled(ids), run(ids))


def test_a_head_with_a_bias(monkeypatch: pytest.MonkeyPatch, rank: tuple[int, int]) -> None:
    """As GPT-J's; vLLM pads and cuts it as it does the rows."""
    linear = table(HEAD, "int8")
    config = config_with(monkeypatch, linear, table(EMBEDDING, "int8", 1))
    head = build_head(True, torch.bfloat16, quant_config=config, prefix="lm_head")
    load(head, linear)
    bias = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)).bfloat16()
    head.bias.weight_loader(head.bias, bias)
    head.quant_method.process_weights_after_loading(head)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(3)).bfloat16()
    padded = torch.nn.functional.pad(bias.float(), (0, -(-VOCABULARY // 64) * 64 - VOCABULARY))
    expected = x.float() @ held(linear, rank).T + padded.unflatten(0, (rank[1], -1))[rank[0]]
    y = head.quant_method.apply(head, x, bias=head.bias)
    assert float((y.float() - expected).norm() / expected.norm()) < BOUND


def build_embedding(*args: Any, **kwargs: Any) -> Any:
    return VocabParallelEmbedding(VOCABULARY, K, *args, **kwargs)


def build_head(*args: Any, **kwargs: Any) -> Any:
    return ParallelLMHead(VOCABULARY, K, *args, **kwargs)


@pytest.mark.parametrize(
    ("build", "arguments", "kind"),
    [
        (build_embedding, {}, SvskTableMethod),
        (build_embedding, {"prefix": EMBEDDING}, SvskTableMethod),
        (build_embedding, {"org_num_embeddings": VOCABULARY}, SvskTableMethod),
        (build_head, {}, SvskHeadMethod),
        (build_head, {"prefix": HEAD}, SvskHeadMethod),
    ],
)
def test_a_model_that_passes_no_config_or_no_name(
    monkeypatch: pytest.MonkeyPatch,
    one_rank: Any,
    build: Callable[..., Any],
    arguments: dict[str, Any],
    kind: type,
) -> None:
    config_with(monkeypatch, table(EMBEDDING, "int8"), table(HEAD, "int8", 1))
    assert type(build(**arguments).quant_method) is kind
    assert type(build(torch.bfloat16, **arguments).quant_method) is kind


def test_tables_of_other_sizes_stay_dense(monkeypatch: pytest.MonkeyPatch, one_rank: Any) -> None:
    """Such as those of positions or token types, which have no name either."""
    config_with(monkeypatch, table(EMBEDDING, "int8"))
    other: Any = VocabParallelEmbedding(16, K)
    assert type(other.quant_method) is UnquantizedEmbeddingMethod


def test_dense_tables_stay_vllms(monkeypatch: pytest.MonkeyPatch, one_rank: Any) -> None:
    config_with(monkeypatch, dense=(EMBEDDING, HEAD))
    for build, prefix in ((build_embedding, EMBEDDING), (build_head, HEAD), (build_head, "")):
        assert type(build(prefix=prefix).quant_method) is UnquantizedEmbeddingMethod


class OtherConfig(QuantizationConfig):
    """Another quantisation in the same process, which notes what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def get_name(self) -> str:
        return "other"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "OtherConfig":
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> None:
        self.asked.append(prefix)


@pytest.mark.parametrize("other", [None, OtherConfig()], ids=["dense", "of another method"])
def test_a_model_of_another_kind_is_untouched(
    monkeypatch: pytest.MonkeyPatch, one_rank: Any, other: OtherConfig | None
) -> None:
    """After one of ours in the same process: vLLM's own layers, asked as their model asks."""
    config_with(monkeypatch, table(EMBEDDING, "int8"), table(HEAD, "int8", 1))
    build_embedding()
    plain = VllmConfig()
    plain.quant_config = other
    with set_current_vllm_config(plain):
        embedding, head = build_embedding(prefix="e"), build_head()
        assert type(embedding.quant_method) is UnquantizedEmbeddingMethod
        assert type(head.quant_method) is UnquantizedEmbeddingMethod
        if other is not None:
            assert other.asked == []
            build_embedding(quant_config=other, prefix="e")
            assert other.asked == ["e"]
    weight = torch.randn(VOCABULARY, K)
    embedding.weight.weight_loader(embedding.weight, weight)
    assert torch.equal(embedding(torch.tensor([3, 149])), weight[[3, 149]])
    assert head.tie_weights(embedding) is head
    assert head.weight is embedding.weight
    assert [name for name, _ in embedding.named_parameters()] == ["weight"]


@pytest.mark.parametrize("kind", ["quad8", "hot rows"])
def test_weights_are_reloaded(
    monkeypatch: pytest.MonkeyPatch, rank: tuple[int, int], kind: Kind
) -> None:
    """Another list of hot rows too, of which each rank has another number."""
    monkeypatch.setenv("SVSK_KERNEL", "portable")
    first, second = table(EMBEDDING, kind), table(EMBEDDING, kind, 5)
    config_with(monkeypatch, first, tied=True)
    layer = build_embedding(torch.bfloat16)
    load(layer, first)
    record_metadata_for_reloading(layer)
    layer.quant_method.process_weights_after_loading(layer)
    places = {name: tensor.data_ptr() for name, tensor in layer.named_parameters()}
    for linear in (second, first):
        initialize_layerwise_reload(layer)
        load(layer, linear)
        finalize_layerwise_reload(layer, None)
        check_rows(layer, held(linear, rank), rank)
        check_product(layer, held(linear, rank))
    assert places == {name: tensor.data_ptr() for name, tensor in layer.named_parameters()}


def test_what_did_not_arrive_is_named(monkeypatch: pytest.MonkeyPatch, one_rank: Any) -> None:
    config_with(monkeypatch, table(EMBEDDING, "int8"))
    layer = build_embedding()
    packed = layer.weight_packed
    packed.weight_loader(
        packed, table(EMBEDDING, "int8").to_tensors()[f"{EMBEDDING}.weight_packed"]
    )
    with pytest.raises(SvskFormatError, match=r"not loaded: model\.embed_tokens\.weight_scale"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_table_of_another_vocabulary_is_refused(
    monkeypatch: pytest.MonkeyPatch, one_rank: Any
) -> None:
    config_with(monkeypatch, table(EMBEDDING, "int8"))
    with pytest.raises(
        SvskFormatError, match=r"holds a weight of 150 x 128, config\.json asks for"
    ):
        VocabParallelEmbedding(200, K, prefix=EMBEDDING)


def test_a_dense_head_that_the_config_quantises_is_refused(
    monkeypatch: pytest.MonkeyPatch, one_rank: Any
) -> None:
    config = config_with(monkeypatch, table(HEAD, "int8"))
    name = f"{HEAD}.weight"
    headers = {name: TensorSpec(torch.bfloat16, (VOCABULARY, K))}
    monkeypatch.setattr(quantization_config, "read_headers", lambda model, revision: headers)
    config.maybe_update_config("folder")
    with pytest.raises(
        SvskFormatError, match=r"head\.weight: stored as it was, but config\.json quantises lm_head"
    ):
        build_head(prefix=HEAD)


@pytest.mark.parametrize(
    ("stored", "declared", "dense", "build", "message"),
    [
        (EMBEDDING, False, (), build_embedding, "does not name it as its embedding"),
        (
            EMBEDDING,
            True,
            (EMBEDDING,),
            build_embedding,
            r"stored both dense \(\.weight\) and quantised\. Remove one",
        ),
        (HEAD, True, (HEAD,), build_head, "both dense"),
    ],
)
def test_contradictions_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    one_rank: Any,
    stored: str,
    declared: bool,
    dense: tuple[str, ...],
    build: Callable[..., Any],
    message: str,
) -> None:
    config_with(monkeypatch, table(stored, "int8"), declared=declared, dense=dense)
    with pytest.raises(SvskFormatError, match=message):
        build(prefix=stored)


@pytest.mark.parametrize("kernel", ["split"])
def test_kernels_that_cannot_look_up_are_refused(
    monkeypatch: pytest.MonkeyPatch, one_rank: Any, kernel: str
) -> None:
    monkeypatch.setenv("SVSK_KERNEL", kernel)
    config_with(monkeypatch, table(EMBEDDING, "quad8"), table(HEAD, "int8", 1))
    with pytest.raises(SvskFormatError, match=r"do not take an embedding table.*portable"):
        build_embedding()
    with pytest.raises(SvskFormatError, match=r"do not take 8-bit codes.*portable"):
        build_head()


def lora(*modules: str) -> Any:
    return SimpleNamespace(target_modules=list(modules) or None)


@pytest.mark.parametrize("build", [build_embedding, build_head])
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_quantised_tables_are_refused(
    monkeypatch: pytest.MonkeyPatch, one_rank: Any, build: Callable[..., Any], tied: bool
) -> None:
    tables = [table(EMBEDDING, "int8")] + ([] if tied else [table(HEAD, "int8", 1)])
    config_with(monkeypatch, *tables, tied=tied)
    current: Any = get_current_vllm_config()
    for modules in ((), ("q_proj", "lm_head"), ("embed_tokens",)):
        current.lora_config = lora(*modules)
        with pytest.raises(SvskFormatError, match=r"read a dense weight.*--lora-target-modules"):
            build()
    current.lora_config = lora("q_proj", "down_proj")
    build()


def test_adapters_of_a_model_with_dense_tables_are_not(
    monkeypatch: pytest.MonkeyPatch, one_rank: Any
) -> None:
    config_with(monkeypatch, dense=(EMBEDDING, HEAD))
    current: Any = get_current_vllm_config()
    current.lora_config = lora()
    for build in (build_embedding, build_head):
        assert type(build().quant_method) is UnquantizedEmbeddingMethod


def test_a_head_that_a_model_ties_in_its_own_way_says_so(
    monkeypatch: pytest.MonkeyPatch, one_rank: Any
) -> None:
    config_with(monkeypatch, table(EMBEDDING, "int8"), tied=True)
    head = build_head(prefix="lm_head")
    with pytest.raises(SvskFormatError, match="does not tie it to the embedding by tie_weights"):
        head.quant_method.apply(head, torch.zeros(1, K))


def test_registering_again_changes_nothing() -> None:
    from vllm.model_executor.custom_op import op_registry_oot

    from svsk_vllm.plugin.vocabulary_layers import register_vocabulary_layers

    before = dict(op_registry_oot)
    register_vocabulary_layers()
    assert op_registry_oot == before
