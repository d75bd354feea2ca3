# SPDX-License-Identifier: Apache-2.0
"""What bitsandbytes stores in NF4, read code by code."""

import importlib
import json

import pytest
import torch

from tests.eval.peers.modules import common


class TestNf4:
    def stored(self) -> dict[str, torch.Tensor]:
        """A layer of 4 x 64 weights: four blocks of 64 codes, their scales in blocks of two."""
        state = {"blocksize": 64, "nested_blocksize": 2, "nested_offset": 0.5, "shape": [4, 64]}
        parts = {
            "": torch.randint(0, 256, (128, 1), dtype=torch.uint8),
            ".absmax": torch.tensor([0, 3, 255, 7], dtype=torch.uint8),
            ".quant_map": torch.linspace(-1, 1, 16),
            ".nested_quant_map": torch.linspace(-1, 1, 256),
            ".nested_absmax": torch.tensor([2.0, 3.0]),
            ".quant_state.bitsandbytes__nf4": torch.tensor(
                list(json.dumps(state).encode()), dtype=torch.uint8
            ),
        }
        return {f"a.weight{part}": tensor for part, tensor in parts.items()}

    def test_code_by_code(self) -> None:
        nf4 = importlib.import_module("peers.bitsandbytes.quantize")
        stored = self.stored()
        weight = nf4.dequantize(stored, "a").flatten()
        for index in range(256):
            byte = int(stored["a.weight"][index // 2])
            level = stored["a.weight.quant_map"][byte & 15 if index % 2 else byte >> 4]
            block = index // 64
            code = int(stored["a.weight.absmax"][block])
            scale = stored["a.weight.nested_quant_map"][code] * (2.0, 3.0)[block // 2] + 0.5
            assert weight[index] == pytest.approx(float(level * scale))
        assert common.stored_bits(stored, "a", nf4.PARTS) == 256 * 4 + 4 * 8 + 2 * 32

    def test_says_what_is_missing_or_does_not_fit(self) -> None:
        nf4 = importlib.import_module("peers.bitsandbytes.quantize")
        stored = self.stored()
        with pytest.raises(common.PeerError, match=r"b: the checkpoint has no b\.weight"):
            nf4.dequantize(stored, "b")
        stored["a.weight"] = stored["a.weight"][:64]
        with pytest.raises(common.PeerError, match="128 codes do not fit 4 scales of 64"):
            nf4.dequantize(stored, "a")
