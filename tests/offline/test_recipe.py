# SPDX-License-Identifier: Apache-2.0
"""Recipe files: what they can say, what is refused, and the form that went before."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from svsk_kernels.errors import SvskError
from svsk_offline.recipe import (
    AlternatingRecipe,
    PublishedRecipe,
    Recipe,
    load_recipe,
    parse_recipe,
    recipe_names,
)

ALTERNATING = "method: alternating\n"
PUBLISHED = "method: published\n"


def load(folder: Path, text: str) -> Recipe:
    path = folder / "own.yaml"
    path.write_text(f"name: own\n{text}")
    return load_recipe(str(path))


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_written_is_read_back(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name)
    for changes in (
        {},
        {"sidecar": {"rank": 0}},
        {"calibration": {"seed": 3}},
        {"smoothing": {"alpha": 0.7, "targets": ("down",)}},
        {"smoothing": {"above": 4, "targets": ("norms",)}},
    ):
        changed = recipe.override(changes)
        (tmp_path / "written.yaml").write_text(yaml.safe_dump(changed.written()))
        assert load_recipe(str(tmp_path / "written.yaml")).digest == changed.digest
    assert recipe.override({"calibration": {"seed": 3}}).digest != recipe.digest


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (PUBLISHED + "sink: {weight: 0.5}", "sink: goes with method alternating only"),
        (PUBLISHED + "gradients: {row_power: 1}", "gradients: goes with method alternating only"),
        (PUBLISHED + "allocation: {target_bpw: 5}", "allocation: goes with method alternating"),
        (PUBLISHED + "alternating: {polish: 1}", "alternating: goes with method alternating only"),
        (PUBLISHED + "published: {rounds: 2}", r"published\.rounds: unknown key"),
        (ALTERNATING + "published: {alpha: 1}", "published: goes with method published only"),
        (ALTERNATING + "allocation: {target_bpw: 3.5}", "expected more than 4"),
        (ALTERNATING + "allocation: {ranks: [0, 2]}", r"allocation\.target_bpw: is missing"),
        (ALTERNATING + "allocation: {target_bpw: 5, ranks: [0, 3]}", "must be even"),
        (ALTERNATING + "allocation: {target_bpw: 5, ranks: []}", "one or more"),
        (ALTERNATING + "allocation: {target_bpw: 5, ranks: [0, 514]}", "expected at most 512"),
        (ALTERNATING + "allocation: {target_bpw: 5, group_sizes: [128]}", "group_sizes"),
        (ALTERNATING + "smoothing: {targets: [down]}", "smoothing: .*smooths nothing. Say above"),
        (PUBLISHED + "smoothing: {alpha: 1.5}", r"smoothing\.alpha: expected at most 1"),
        (PUBLISHED + "smoothing: {above: 0.5}", r"smoothing\.above: expected at least 1"),
        (PUBLISHED + "smoothing: {above: .inf}", r"smoothing\.above: .*finite"),
        (PUBLISHED + "smoothing: {alpha: 0.5, above: 4}", r"alpha \(0\.5\) and above \(4\.0\)"),
        (PUBLISHED + "smoothing: {alpha: 0.5, targets: []}", "one or more of norms, o and down"),
        ("method: gptq", "method: expected published or alternating, got 'gptq'"),
        ("[1]", "not valid YAML"),
    ],
)
def test_recipes_that_cannot_be(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(SvskError, match=message):
        load(tmp_path, lines)


@pytest.mark.parametrize(
    ("lines", "keys"),
    [
        (PUBLISHED + "sidecar: {rank: 0, tile_m: 48}", "sidecar.tile_m: no effect at rank 0"),
        (PUBLISHED + "sidecar: {tile_n: 48}", "sidecar.tile_n: no effect at rank 0"),
        (PUBLISHED + "sidecar: {rank: 0}\npublished: {ridge: 1}", "published.ridge: no effect"),
        (
            ALTERNATING + "sidecar: {rank: 0, num_bits: 4}\nalternating: {rounds: 2, ridge: 1}",
            "sidecar.num_bits, alternating.ridge, alternating.rounds: no effect at rank 0",
        ),
        (
            ALTERNATING + "sidecar: {rank: 8, num_bits: 4}\nallocation: {target_bpw: 5}",
            "sidecar.rank, sidecar.num_bits: no effect under a bit budget",
        ),
        (
            ALTERNATING + "allocation: {target_bpw: 5, ranks: [0]}\nalternating: {rounds: 2}",
            "alternating.rounds: no effect at rank 0",
        ),
        (ALTERNATING + "sink: {targets: [a]}", "sink.targets: no effect without sink.weight"),
        (
            ALTERNATING + "smoothing: {keys: true, targets: [o]}",
            "smoothing.targets: no effect without smoothing.alpha or smoothing.above",
        ),
        (ALTERNATING + "gradients: {shared: true}", "gradients.shared: no effect without"),
        (ALTERNATING + "gradients: {samples: 4}", "gradients.samples: no effect where no"),
        (
            ALTERNATING + "gradients: {token_power: 1, samples: 4}",
            "gradients.samples: no effect beside gradients.token_power",
        ),
        (
            ALTERNATING + "sidecar: {rank: 0}\ngradients: {row_power: 1}",
            "gradients.row_power: no effect at rank 0",
        ),
    ],
)
def test_keys_without_effect_are_refused(tmp_path: Path, lines: str, keys: str) -> None:
    with pytest.raises(SvskError) as caught:
        load(tmp_path, lines)
    assert keys in str(caught.value)
    assert str(caught.value).endswith("Leave that out.")


def test_the_same_keys_with_effect_are_taken(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        ALTERNATING
        + "sidecar: {rank: 4, tile_m: 48, num_bits: 4}\nalternating: {rounds: 2, ridge: 1}\n"
        + "sink: {weight: 1, targets: [a]}\ngradients: {row_power: 1, samples: 4}\n",
    )
    assert isinstance(recipe, AlternatingRecipe)
    assert recipe.needs_gradients
    assert recipe.sink_weight("a") == 1
    assert recipe.sink_weight("b") == 0
    without = recipe.override({"sidecar": {"rank": 0}})
    assert not without.needs_gradients
    assert without.override({"sidecar": {"tile_m": 0}}).digest == without.digest
    with pytest.raises(
        SvskError,
        match=r"^--tile-m, --tile-n: no effect at rank 0, which has no sidecar. Leave that out",
    ):
        without.refuse_idle({"sidecar.tile_m": "--tile-m", "sidecar.tile_n": "--tile-n"})


def test_the_page_shows_what_holds_by_default() -> None:
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    _, _, example = page.read_text(encoding="utf-8").partition("```yaml\n")
    recipe = parse_recipe(yaml.safe_load(example.partition("```")[0]), page.name)
    assert recipe == AlternatingRecipe(name="mine")


# Recipe files once had a base and a fit, of two kinds each.


def shown(folder: Path, text: str) -> tuple[Recipe, str]:
    """The recipe that the message about an old file shows, and the message."""
    with pytest.raises(SvskError, match="Write this one as:") as caught:
        load(folder, text)
    message = str(caught.value)
    _, _, rest = message.partition("Write this one as:\n\n")
    return parse_recipe(yaml.safe_load(rest.partition("\n(")[0]), "shown"), message


def test_an_old_file_is_shown_in_the_new_form(tmp_path: Path) -> None:
    recipe, _ = shown(
        tmp_path,
        "base: {method: gptq, damping: 0.02, polish: 2}\nfit: {method: hessian, ridge: 0.1}\n"
        "sidecar: {rank: 8, num_bits: 4}\nsink: {weight: 2.0}\nignore: [lm_head, a]\n",
    )
    assert isinstance(recipe, AlternatingRecipe)
    assert recipe == AlternatingRecipe.checked(
        {
            "name": "own",
            "alternating": {"damping": 0.02, "polish": 2, "ridge": 0.1},
            "sidecar": {"rank": 8, "num_bits": 4},
            "sink": {"weight": 2.0},
            "ignore": ("lm_head", "a"),
        },
        "",
    )


def test_an_old_file_of_the_published_method(tmp_path: Path) -> None:
    aa = "base: {method: aa, alpha: 1.0}\nfit: {method: diagonal, ridge: 0.1}\n"
    recipe, _ = shown(tmp_path, aa)
    assert isinstance(recipe, PublishedRecipe)
    assert (recipe.published.alpha, recipe.published.ridge) == (1.0, 0.1)
    # That was what a file got which said neither.
    plain, message = shown(tmp_path, "sidecar: {rank: 0, num_bits: 4}\n")
    assert plain == PublishedRecipe.checked({"name": "own", "sidecar": {"rank": 0}}, "")
    assert message.endswith("(sidecar.num_bits: had no effect.)")


def test_old_files_that_were_refused_still_are(tmp_path: Path) -> None:
    for text in (
        "base: {method: gptq}\n",
        "fit: {method: hessian}\n",
        "base: {method: gptq}\nfit: {method: diagonal}\n",
    ):
        with pytest.raises(SvskError, match=r"base (gptq|aa) with fit \w+ is no method"):
            load(tmp_path, text)
    with pytest.raises(SvskError, match="sink: goes with method alternating only"):
        load(tmp_path, "sink: {weight: 0.5}\n")
    with pytest.raises(SvskError, match="fit: is no mapping"):
        load(tmp_path, "base: gptq\n")


def test_old_files_keep_their_typing_errors(tmp_path: Path) -> None:
    wrong: dict[str, Any] = {"base: {method: aa, alphas: 1}": r"published\.alphas: unknown key"}
    for text, message in wrong.items():
        with pytest.raises(SvskError, match=message):
            load(tmp_path, text)


def test_files_that_hold_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- published")
    for name, message in (
        ("list.yaml", "holds a list, expected a mapping of sections"),
        ("no.yaml", r"no\.yaml: no such file. Shipped recipes: .*fast"),
    ):
        with pytest.raises(SvskError, match=message):
            load_recipe(str(tmp_path / name))
