# SPDX-License-Identifier: Apache-2.0
"""How far a checkpoint is from its original: ``python evaluate.py CHECKPOINT ORIGINAL TEXT``."""

import sys

from svsk_eval import evaluate

checkpoint, original, text = sys.argv[1:4]
result = evaluate(checkpoint, original, text, chunks=4, seq_len=64)
print(f"KL {result.kl_mean:.4f} ± {result.kl_mean_se:.4f}, top-1 {result.top1:.1%}")
