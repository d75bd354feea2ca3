# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a GGUF file for llama.cpp. Needs the package ``gguf``."""
