# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds: ``python inspect_checkpoint.py CHECKPOINT``. Imports no torch."""

import sys

from svsk_offline import inspect

found = inspect(sys.argv[1])
print(f"{found.bits_per_weight:.3f} bits per weight, {found.bytes_on_disk / 1e6:.1f} MB")
for matrices in found.matrices:
    print(f"{matrices.count} x {matrices.kind} {matrices.shape}: rank {matrices.rank}")
for name, error in sorted(found.errors.items(), key=lambda item: -item[1])[:3]:
    print(f"{name}: {error:.2e}")
