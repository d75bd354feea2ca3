# SPDX-License-Identifier: Apache-2.0
"""What `svsk export --to compressed-tensors` writes, served by vLLM without the plugin."""

from pathlib import Path

from svsk_offline.export.compressed_tensors import export_compressed_tensors
from svsk_vllm.format import Checkpoint
from tests.serving.conftest import Run, served_schemes
from tests.serving.transformers_answers import compare_with_transformers, prompts
from tests.support.cpu_paths import needs_avx512
from tests.support.tiny_models import write_dense, write_random_svsk

BOUND = 0.02
"""Of the mean difference of log-probabilities: vLLM computes in bfloat16, the other in float32."""


@needs_avx512
def test_served_without_the_plugin(tmp_path: Path, run_vllm: Run) -> None:
    """vLLM's own W4A16 kernel, groups of 32 and 64, an attention that stayed dense."""
    svsk = write_random_svsk(
        write_dense(tmp_path / "dense", "qwen2"),
        tmp_path / "svsk",
        schemes=served_schemes(),
        ignore=("lm_head", r"re:.*\.0\.self_attn"),
    )
    out = export_compressed_tensors(svsk, tmp_path / "out")
    asked = prompts()
    served = run_vllm(out, asked, max_tokens=16, plugins=False)
    assert served["methods"]["CompressedTensorsLinearMethod"] == 6
    assert not [name for name in served["methods"] if "Svsk" in name]
    found = compare_with_transformers(out, asked, served)
    print(f"mean {found.mean:.5f}, {found.clear} clear choices")
    assert found.mean < BOUND
    assert found.flipped == [], "tokens differ where the choice was clear"
    assert found.clear > 0.3 * 16 * len(asked), "too few clear choices to mean anything"
    assert any(spec.rank for spec in Checkpoint(svsk).linears.values()), "no sidecar to drop"
