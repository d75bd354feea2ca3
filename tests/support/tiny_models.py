# SPDX-License-Identifier: Apache-2.0
"""Tiny Hugging Face models and SVSK checkpoints of them, for tests that load a whole model.

``write_dense`` makes a random model folder, ``write_random_svsk`` an SVSK checkpoint of it, and
``write_restored`` the dense folder the checkpoint stands for, which is what a loader is compared
with. None of them uses the offline tool.

The shapes are awkward on purpose: K is a multiple of 64 but tiles of 48 x 96 fit neither N nor K,
and q/k/v and gate/up differ in rank. N is a multiple of 32, which vLLM's 4-bit kernel for the CPU
wants.
"""

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from svsk_kernels.codebook import code_bits
from svsk_vllm.format import (
    Checkpoint,
    Codebook,
    ConfigGroup,
    EmbeddingArgs,
    LinearSpec,
    QuantizedLinear,
    ShardedReader,
    SidecarArgs,
    SvskCheckpointConfig,
    WeightArgs,
    codebook_levels,
    restored_weight,
)
from svsk_vllm.format.fingerprint import FINGERPRINT_KEY
from svsk_vllm.format.group_scales import ScaleBits
from svsk_vllm.format.model_config import declared, undeclared
from svsk_vllm.format.seal import schemes_metadata
from svsk_vllm.format.shards import INDEX_NAME
from tests.support.format_builders import save_shards, write_json

TILE_M: Final = 48
TILE_N: Final = 96
VOCAB: Final = 320
PAD, EOS, BOS = 256, 257, 258
SIDECAR_FRACTION: Final = 0.05
EMBEDDING: Final = "model.embed_tokens"
HOT_ROWS: Final = 90
"""Of tables of kind mixed-int8; drawn from all over."""


@dataclass(frozen=True)
class Family:
    """An architecture and the settings of its tiny model."""

    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hf_config(self) -> dict[str, Any]:
        """Keys of config.json: two layers, four query heads, two key/value heads."""
        return {
            "vocab_size": VOCAB,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "bos_token_id": BOS,
            **self.settings,
        }


FAMILIES: Final[dict[str, Family]] = {
    # No bias anywhere, head tied to the embedding.
    "llama": Family("llama", {"tie_word_embeddings": True}),
    # Biases on q, k and v.
    "qwen2": Family("qwen2", {"tie_word_embeddings": False}),
    # Norms on q and k; heads of 64, twice hidden_size / num_attention_heads.
    "qwen3": Family("qwen3", {"tie_word_embeddings": False, "head_dim": 64}),
    # Heads of 32, so that o_proj's K (128) is smaller than its N (192).
    "mistral": Family(
        "mistral",
        {"tie_word_embeddings": False, "hidden_size": 192, "head_dim": 32, "sliding_window": None},
    ),
}
"""What most tests run through."""

MORE_FAMILIES: Final[dict[str, Family]] = {
    # q, k, v and gate, up are stored as one.
    "phi3": Family("phi3", {"tie_word_embeddings": False}),
    # Biases everywhere, the output head's too; vLLM serves transformers' class.
    "phi": Family("phi", {"tie_word_embeddings": False}),
    # Biases everywhere, no gate; vLLM serves transformers' class.
    "starcoder2": Family("starcoder2", {"tie_word_embeddings": True, "sliding_window": None}),
    # Soft caps, scaled embeddings, layers that look at a window of the past.
    "gemma2": Family("gemma2", {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32}),
    "gemma3": Family(
        "gemma3_text", {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32}
    ),
    # Multipliers of embeddings, residuals, attention and logits.
    "granite": Family(
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
    ),
    # Attention and MLP read one norm; tied head with scaled logits.
    "cohere": Family("cohere", {"logit_scale": 0.5}),
    # Norms after attention and MLP, and on all of q and k at once.
    "olmo2": Family("olmo2", {"tie_word_embeddings": False}),
    "exaone4": Family(
        "exaone4", {"tie_word_embeddings": False, "sliding_window": 64, "sliding_window_pattern": 2}
    ),
    # No gate; an activation with parameters of its own.
    "apertus": Family("apertus", {"tie_word_embeddings": False}),
    # No gate, squared activation, norms of 1 plus what is stored.
    "nemotron": Family("nemotron", {"tie_word_embeddings": False}),
    "stablelm": Family("stablelm", {"tie_word_embeddings": False, "use_qkv_bias": True}),
    # q, k and v apart, gate and up stored as one.
    "glm4": Family("glm4", {"tie_word_embeddings": False, "head_dim": 32}),
    # q, k and v stored as one: by heads, and in groups of key/value heads.
    "falcon": Family(
        "falcon",
        {
            "new_decoder_architecture": False,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "alibi": False,
        },
    ),
    "falcon-grouped": Family(
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False, "alibi": False},
    ),
    "bloom": Family("bloom"),
}
"""What differs in names, in what is stored as one, or in what stands around the linears."""


_LATENT: Final = {
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}

EXPERT_FAMILIES: Final[dict[str, Family]] = {
    "qwen3_moe": Family(
        "qwen3_moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "head_dim": 32,
            "tie_word_embeddings": False,
        },
    ),
    # A shared expert, with a gate of its own.
    "qwen2_moe": Family(
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 128,
            "tie_word_embeddings": False,
        },
    ),
    "olmoe": Family(
        "olmoe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "tie_word_embeddings": False,
        },
    ),
    # Stored as block_sparse_moe, with w1, w3 and w2.
    "mixtral": Family(
        "mixtral",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 128,
            "tie_word_embeddings": False,
        },
    ),
    # Latent attention, a dense first block, shared experts.
    "deepseek_v2": Family(
        "deepseek_v2",
        {
            **_LATENT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
        },
    ),
    # The same, routed by groups, with a bias that only chooses.
    "deepseek_v3": Family(
        "deepseek_v3",
        {
            **_LATENT,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            # Of the real config. transformers' class needs neither, vLLM reads both.
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        },
    ),
}
"""Mixtures of experts whose matrices are stored one by one."""

_DELTA_NET: Final = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    # What vLLM's kernels on a CPU take, as in the real models.
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "tie_word_embeddings": False,
}
_MAMBA: Final = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "tie_word_embeddings": False,
}

HYBRID_FAMILIES: Final[dict[str, Family]] = {
    # Gated delta nets in three blocks of four; vLLM fuses what is stored in two parts.
    "qwen3_5": Family("qwen3_5_text", _DELTA_NET),
    # The same stored as one, and experts.
    "qwen3_next": Family(
        "qwen3_next",
        {
            **_DELTA_NET,
            "layer_types": [*["linear_attention"] * 3, "full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    # Mamba 2 beside attention in every block; in every other block.
    "falcon_h1": Family("falcon_h1", {**_MAMBA, "mamba_d_ssm": 256}),
    "granite4": Family(
        "granitemoehybrid",
        {
            **_MAMBA,
            "num_local_experts": 0,
            "shared_intermediate_size": 256,
            "layer_types": ["mamba", "attention"],
        },
    ),
}
"""Blocks of several kinds, with convolutions and small gates that stay dense."""


def write_dense(
    folder: Path,
    family: Family | str = "llama",
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Write a random model with its tokenizer.

    Weights are large enough for the next token to depend on every layer, embeddings small enough
    for a tied head not to repeat the last token. Biases and norms are random too: models start with
    zeros and ones there, which would hide one that gets lost.

    Args:
        folder: made when missing.
        family: a key of ``FAMILIES``, ``MORE_FAMILIES``, ``EXPERT_FAMILIES`` or
            ``HYBRID_FAMILIES``, or any other architecture of transformers.
        dtype: dtype the weights are stored in.
        seed: of the weights.

    Returns:
        ``folder``.
    """
    known = FAMILIES | MORE_FAMILIES | EXPERT_FAMILIES | HYBRID_FAMILIES
    family = known[family] if isinstance(family, str) else family
    config = AutoConfig.for_model(family.model_type, **family.hf_config)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.2 * noise + (0.0 if name.endswith("bias") else 1.0))
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer of ``VOCAB`` tokens.

    The bytes, pad, eos, bos, and pairs of letters.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<eos>", "<bos>"]
    letters = "etaoinshr"
    merges = [(a, b) for a in letters for b in letters][: VOCAB - len(alphabet) - len(special)]
    tokens = [*alphabet, *special, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1], bos_token=special[2]
    ).save_pretrained(folder)


def scheme(
    *targets: str,
    rank: int = 0,
    num_bits: int = 8,
    group_size: int = 64,
    codebook: Codebook = "int4",
    scale_bits: ScaleBits = 16,
    tile_m: int = TILE_M,
    tile_n: int = TILE_N,
    hot_rows: int = 0,
) -> ConfigGroup:
    """A config group for the targets, with misaligned tiles unless told otherwise."""
    return ConfigGroup(
        targets=targets,
        weights=WeightArgs(
            num_bits=code_bits(codebook),
            group_size=group_size,
            codebook=codebook,
            scale_bits=scale_bits,
            hot_rows=hot_rows,
        ),
        sidecar=SidecarArgs.model_validate(
            {"rank": rank, "num_bits": num_bits, "tile_m": tile_m, "tile_n": tile_n}
        ),
    )


def default_schemes() -> dict[str, ConfigGroup]:
    """Every kind of scheme in one model.

    Linears that vLLM fuses differ in rank only (v has none).
    """
    return {
        "default": scheme("Linear", rank=3),
        "q": scheme(r"re:.*\.q_proj$", rank=4),
        "k": scheme(r"re:.*\.k_proj$", rank=1),
        "v": scheme(r"re:.*\.v_proj$"),
        "o": scheme(r"re:.*\.o_proj$", rank=8, num_bits=4, group_size=32, codebook="quad8"),
        "gate": scheme(r"re:.*\.gate_proj$", rank=2, num_bits=4, codebook="quad8"),
        "up": scheme(r"re:.*\.up_proj$", rank=6, num_bits=4, codebook="quad8"),
    }


TableKind = Literal["int8", "quad8", "mixed-int8"]


def table_schemes(head: TableKind | None, embedding: TableKind | None) -> dict[str, ConfigGroup]:
    """Schemes of an output head and an embedding table: 8 bits, 4 with a sidecar, or both."""

    def of(target: str, kind: TableKind) -> ConfigGroup:
        if kind == "mixed-int8":
            return scheme(target, hot_rows=HOT_ROWS)
        if kind == "int8":
            return scheme(target, codebook=kind)
        return scheme(
            target, codebook=kind, group_size=32, scale_bits=6, rank=4, num_bits=4, tile_m=0
        )

    schemes = {} if head is None else {"head": of("lm_head", head)}
    return schemes if embedding is None else schemes | {"embedding": of(EMBEDDING, embedding)}


def write_random_svsk(
    dense: Path,
    out: Path,
    *,
    schemes: Mapping[str, ConfigGroup] | None = None,
    ignore: Collection[str] = ("lm_head",),
    linears: Collection[str] | None = None,
    embedding: EmbeddingArgs | None = None,
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Write an SVSK checkpoint of a dense folder.

    Rounded weights, and a random sidecar of a few percent of them.

    Args:
        dense: model folder as ``write_dense`` makes it.
        out: folder to write; tokenizer and generation config are copied.
        schemes: config groups by key, ``default_schemes()`` when None.
        ignore: ignore list of the config.
        linears: names of the linears to quantise, by default every ``torch.nn.Linear`` that gets a
            scheme.
        embedding: the table to quantise too, by a scheme that names it.
        shards: 1 for ``model.safetensors``, more for that many shards (tensors dealt in turn) and
            an index.
        seed: of the sidecar.

    Returns:
        ``out``.
    """
    config = SvskCheckpointConfig(
        config_groups=dict(schemes or default_schemes()),
        ignore=tuple(ignore),
        embedding=embedding,
    )
    reader = ShardedReader(dense)
    names = {*(linear_names(dense) if linears is None else linears)}
    if embedding is not None:
        names.add(embedding.module)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name in reader.names:
        tensor, module = reader.read(name), name.removesuffix(".weight")
        group = config.scheme_for(module) if module in names and name != module else None
        tensors |= (
            {name: tensor}
            if group is None
            else round_with_sidecar(module, tensor, group, generator).to_tensors()
        )
    _copy_side_files(dense, out)
    hf_config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    write_json(out / "config.json", declared(hf_config, config))
    stored = {module: config.scheme_for(module) for name in tensors if (module := _packed(name))}
    metadata = schemes_metadata({module: group for module, group in stored.items() if group})
    save_shards(out, tensors, shards, {"format": "pt", **metadata, FINGERPRINT_KEY: f"run {seed}"})
    return out


def _packed(name: str) -> str | None:
    """The module whose codes a tensor holds."""
    module, _, last = name.rpartition(".")
    return module if last == "weight_packed" else None


def round_with_sidecar(
    name: str, weight: torch.Tensor, group: ConfigGroup, generator: torch.Generator
) -> QuantizedLinear:
    """Round a weight to the nearest codes with absmax scales, and give it a random sidecar.

    Args:
        name: module name.
        weight: [N, K] in the model's dtype, which the scales get too.
        group: the scheme.
        generator: of the sidecar, whose root mean square is ``SIDECAR_FRACTION`` of the weight's.
    """
    n, k = weight.shape
    spec = LinearSpec(name, n, k, group, weight.dtype)
    levels = codebook_levels(group.weights.codebook)
    grouped = weight.float().view(n, -1, spec.group_size)
    absmax = (grouped.abs().amax(dim=-1) / levels[-1]).clamp(min=1e-6)
    scale = spec.scales.round(absmax, spec.scales.row_scale(absmax)).to(weight.dtype)
    nearest = torch.bucketize(grouped / scale.float().unsqueeze(-1), (levels[1:] + levels[:-1]) / 2)
    codes = (nearest - len(levels) // 2).to(torch.int8).view(n, k)
    if group.weights.hot_rows:
        hot = torch.randperm(n, generator=generator)[: group.weights.hot_rows].sort().values
        scale[hot] = (grouped[hot].abs().amax(-1) / 127).clamp(min=1e-6).to(weight.dtype)
        steps = (grouped[hot] / scale[hot].float().unsqueeze(-1)).round().clamp(-127, 127)
        codes[hot] = steps.flatten(1).to(torch.int8)
        return QuantizedLinear(spec, codes, scale, hot=hot.to(torch.int32))
    if not spec.rank:
        return QuantizedLinear(spec, codes, scale)
    rows, cols, r = spec.grid.num_row_tiles, spec.grid.num_col_tiles, spec.rank
    limit = 8 if spec.factor_bits == 4 else 128
    u = torch.randint(-limit, limit, (n, cols, r), generator=generator, dtype=torch.int8)
    v = torch.randint(-limit, limit, (rows, r, k), generator=generator, dtype=torch.int8)
    rms = weight.float().square().mean().sqrt() * SIDECAR_FRACTION
    # A uniform factor has the root mean square limit / sqrt(3)
    unit = float(rms) / (r**0.5 * limit**2 / 3)
    gain = unit * (0.5 + torch.rand(rows, cols, r, generator=generator))
    return QuantizedLinear(spec, codes, scale, u, v, gain)


def write_restored(svsk: Path, out: Path) -> Path:
    """Write the dense folder an SVSK checkpoint stands for.

    Args:
        svsk: SVSK folder.
        out: folder to write.

    Returns:
        ``out``.
    """
    checkpoint = Checkpoint(svsk)
    tensors = {name: checkpoint.read_dense(name) for name in checkpoint.dense_names}
    tensors |= {
        f"{name}.weight": restored_weight(linear) for name, linear in checkpoint.iter_linears()
    }
    _copy_side_files(svsk, out)
    write_json(out / "config.json", undeclared(checkpoint.hf_config))
    save_shards(out, tensors, 1, {"format": "pt"})
    return out


def linear_names(dense: Path) -> set[str]:
    """Names of the ``torch.nn.Linear`` modules of a model folder's architecture."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(dense))
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def _copy_side_files(source: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", INDEX_NAME):
            shutil.copyfile(path, out / path.name)
