# SPDX-License-Identifier: Apache-2.0
"""``python -m svsk_kernel_tools.bench``.

Check the kernels on the GPU at hand, then time them or write its tuning table.

It needs torch, Triton, typer, rich, pydantic and safetensors, no vLLM; where vLLM is importable,
its Marlin kernel with a separate sidecar is timed as well. In Triton's interpreter (``--device
cpu``) only the checks run.
"""
