# SPDX-License-Identifier: Apache-2.0
"""Quantise a model with a recipe of one's own: ``python quantize.py MODEL OUT``."""

import sys

from svsk_offline import Progress, load_recipe, quantize

model, out = sys.argv[1:3]
recipe = load_recipe("fast").override({"sidecar": {"rank": 8}, "calibration": {"samples": 24}})
# A real model takes as many samples as it needs where `samples` is left out, and longer ones.
recipe = recipe.override({"calibration": {"seq_len": 32}})
result = quantize(model, out, recipe, progress=Progress(message=print))
print(f"{result.bits_per_weight:.3f} bits per weight in {result.folder.name}")
worst = max(result.layers, key=lambda layer: layer.error or 0)
print(f"largest error of an output: {worst.name}")
