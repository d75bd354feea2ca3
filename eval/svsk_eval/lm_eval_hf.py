# SPDX-License-Identifier: Apache-2.0
"""lm-eval's own command line, with a transformers that can load SVSK checkpoints.

``python -m svsk_eval.lm_eval_hf run --model hf --model_args pretrained=CHECKPOINT --tasks
svsk_smoke --include_path eval/tasks``: everything after the module's name goes to lm-eval
unchanged. Its vLLM model needs no such wrapper.

lm-eval computes in the checkpoint's dtype: on a CPU without bfloat16 products add ``dtype=float32``
to the model's arguments, as ``svsk bench --engine hf`` does.
"""

from lm_eval.__main__ import cli_evaluate

import svsk_vllm.hf  # noqa: F401 - registers the quantisation method with transformers

if __name__ == "__main__":
    cli_evaluate()
