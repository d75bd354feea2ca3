# SPDX-License-Identifier: Apache-2.0
"""Factors that are multiplied in where weights are read."""

from pathlib import Path

import pytest
import torch

from svsk_kernels.errors import SvskError
from svsk_offline.export.dense import restore
from svsk_offline.pipeline import quantize
from svsk_offline.recipe import Recipe
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.fold import LARGEST_EXPONENT, Fold, powers_of_two, to_steps
from svsk_offline.storage.loaded_weight import loaded_weight
from svsk_vllm.format import ShardedReader, SvskFormatError
from tests.support.tiny_models import write_dense

UP, NORM = "model.layers.0.mlp.up_proj", "model.layers.1.input_layernorm.weight"


def exponents(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (size,), generator=generator, dtype=torch.int8)


def test_powers_are_exact() -> None:
    every = torch.arange(-126, 128, dtype=torch.int8)
    expected = torch.tensor([2.0 ** int(e) for e in every], dtype=torch.float64)
    assert torch.equal(powers_of_two(every).double(), expected)
    assert torch.equal(powers_of_two(every.float()).double(), expected)


def test_eighths_of_an_octave() -> None:
    wanted = torch.linspace(-16, 16, 999)
    exponents = to_steps(wanted)
    assert torch.equal(exponents * 8, (exponents * 8).round())
    assert (exponents - wanted).abs().max() <= 1 / 16
    powers = powers_of_two(exponents)
    assert torch.allclose(powers.double(), 2.0 ** exponents.double(), rtol=1e-6)
    assert torch.allclose(powers * powers_of_two(-exponents), torch.ones(999), rtol=1e-6)


def test_finer_factors_are_not_rounded_to_a_stored_dtype(tiny_llama: Path) -> None:
    source = ModelSource(tiny_llama)
    n = source.tensors.describe(f"{UP}.weight").shape[0]
    fold = Fold({f"{UP}.weight": exponents(n).float() + 0.125})
    folded = source.folded(fold)
    assert folded.tensors.describe(f"{UP}.weight").dtype == torch.float32
    assert folded.tensors.describe(NORM).dtype == torch.bfloat16
    stored = source.tensors.read(f"{UP}.weight")
    expected = stored.double() * 2.0 ** (exponents(n).double() + 0.125)[:, None]
    read = folded.tensors.read(f"{UP}.weight")
    assert read.dtype == torch.float32
    assert torch.allclose(read.double(), expected, rtol=1e-6)
    assert source.folded(Fold({f"{UP}.weight": exponents(n)})).identity() != folded.identity()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_columns_and_back(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows, columns = exponents(5), exponents(7, 1)
    fold = Fold({"w": rows, "b": rows}, {"w": columns})
    before = weight.clone()
    scaled = fold.scale("w", weight)
    assert scaled.dtype == dtype
    plain = weight.double() * 2.0 ** rows.double()[:, None] * 2.0 ** columns.double()
    assert torch.equal(scaled.double(), plain)
    assert torch.equal(Fold({"w": -rows}, {"w": -columns}).scale("w", scaled), weight)
    assert torch.equal(weight, before)  # it may be the folder's own pages
    bias = fold.scale("b", weight[:, 0])
    assert torch.equal(bias.double(), weight[:, 0].double() * 2.0 ** rows.double())
    assert fold.scale("other", weight) is weight


def test_float16_loses_nothing() -> None:
    """Its smallest numbers have no bits to give."""
    small = torch.tensor([6e-8, 1.5e-5, 60000.0], dtype=torch.float16)
    fold = Fold({"w": torch.tensor([-4, -9, 9], dtype=torch.int8)})
    scaled = fold.scale("w", small)
    assert scaled.dtype == torch.float32
    assert torch.equal(Fold({"w": -fold.rows["w"]}).scale("w", scaled), small.float())


def test_a_value_that_becomes_infinite_is_refused() -> None:
    fold = Fold({"w": torch.tensor([LARGEST_EXPONENT], dtype=torch.int8)})
    with pytest.raises(SvskError, match=r"w: smoothing makes a value larger than torch\.float32"):
        fold.scale("w", torch.tensor([3e38]))
    assert torch.isinf(fold.scale("w", torch.tensor([torch.inf]))).all()  # was before


def test_saved_and_loaded(tmp_path: Path) -> None:
    fold = Fold({"a.weight": exponents(4)}, {"a.weight": exponents(6, 1)})
    fold.save(tmp_path / "f.safetensors", {"said": "so"})
    again, metadata = Fold.load(tmp_path / "f.safetensors")
    assert again.digest == fold.digest
    assert metadata["said"] == "so"
    other = Fold({"a.weight": exponents(4)}, {"a.weight": exponents(6, 2)})
    assert other.digest != fold.digest != Fold(fold.columns, fold.rows).digest


def test_everything_that_is_read_is_folded(tiny_llama: Path) -> None:
    """Tensors by name, loaded blocks, and the weights that are quantised."""
    source = ModelSource(tiny_llama)
    n, k = source.tensors.describe(f"{UP}.weight").shape
    fold = Fold({f"{UP}.weight": exponents(n), NORM: exponents(k, 2)})
    folded = source.folded(fold)
    stored = ShardedReader(tiny_llama)
    for name in stored.names:
        expected = fold.scale(name, stored.read(name))
        assert torch.equal(folded.tensors.read(name), expected)
        assert folded.tensors.describe(name).dtype == expected.dtype
        assert torch.equal(source.tensors.read(name), stored.read(name))
    name, blocks = folded.blocks
    for index, key in ((0, "mlp.up_proj"), (1, "input_layernorm")):
        folded.load(blocks[index], f"{name}.{index}.", torch.float32, torch.device("cpu"))
        loaded = blocks[index].get_parameter(f"{key}.weight")
        full = f"{name}.{index}.{key}.weight"
        assert torch.equal(loaded, fold.scale(full, stored.read(full)).float())
    weight = loaded_weight(folded, UP, blocks[0].get_submodule("mlp.up_proj"))
    assert torch.equal(weight.float(), folded.tensors.read(f"{UP}.weight").float())


def test_a_folded_model_is_another_model(tiny_llama: Path) -> None:
    source = ModelSource(tiny_llama)
    n = source.tensors.describe(f"{UP}.weight").shape[0]
    folds = [Fold({f"{UP}.weight": exponents(n, seed)}) for seed in (0, 1)]
    models = [source, *(source.folded(fold) for fold in folds)]
    assert len({str(model.identity()) for model in models}) == 3
    assert len({model.content_sample for model in models}) == 3
    again = ModelSource(tiny_llama).folded(Fold({f"{UP}.weight": exponents(n, 0)}))
    assert again.content_sample == models[1].content_sample
    assert again.identity() == models[1].identity()


def test_a_checkpoint_is_read_as_what_it_stands_for(
    tmp_path: Path, tiny_qwen2: Path, tiny_recipe: Recipe
) -> None:
    quantize(tiny_qwen2, tmp_path / "out", tiny_recipe)
    dense = ShardedReader(restore(tmp_path / "out", tmp_path / "dense"))
    source = ModelSource(tmp_path / "out", restored=True)
    source.check()
    assert set(source.tensors.names) == set(dense.names)
    for name in dense.names:
        assert torch.equal(source.tensors.read(name), dense.read(name))
        assert source.tensors.describe(name) == dense.describe(name)
        assert name in source.tensors
    assert source.tensors.shard_of(f"{UP}.weight") in {p.name for p in (tmp_path / "out").iterdir()}
    with pytest.raises(SvskError, match="quantised already"):
        ModelSource(tmp_path / "out")


def test_a_damaged_file_of_factors(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    Fold({"a": exponents(4)}).save(path, {})
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(SvskFormatError, match=r"f\.safetensors"):
        Fold.load(path)


def test_float16_models(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "llama", dtype=torch.float16)
    source = ModelSource(dense)
    n = source.tensors.describe(f"{UP}.weight").shape[0]
    folded = source.folded(Fold({f"{UP}.weight": exponents(n)}))
    assert folded.tensors.describe(f"{UP}.weight").dtype == torch.float32
    assert folded.model_dtype("auto") == torch.float16
