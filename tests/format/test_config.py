# SPDX-License-Identifier: Apache-2.0
"""The quantization_config: schema, versions, and which scheme a module gets."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from svsk_vllm.format import ConfigGroup, SvskCheckpointConfig, SvskFormatError
from svsk_vllm.version import FORMAT_VERSION, __version__
from tests.support.format_builders import make_group

Raw = dict[str, Any]

EXAMPLE: Raw = {
    "quant_method": "svsk",
    "format": "svsk",
    "version": "1.0",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 64,
                "codebook": "int4",
            },
            "sidecar": {"rank": 16, "tile_m": 512, "tile_n": 1024, "num_bits": 8},
        }
    },
    "ignore": ["lm_head"],
    "producer": {"svsk": "0.1.0", "calibration": {"samples": 128}},
}


def changed(change: Callable[[Raw], object]) -> Raw:
    raw = copy.deepcopy(EXAMPLE)
    change(raw)
    return raw


def group_0(raw: Raw) -> Raw:
    group: Raw = raw["config_groups"]["group_0"]
    return group


def make_config(
    targets: dict[str, list[str]], ignore: tuple[str, ...] = ()
) -> SvskCheckpointConfig:
    """A config with one group per entry of ``targets``.

    Each has another rank, which tells them apart.
    """
    groups = {
        key: make_group(targets=entries, rank=rank)
        for rank, (key, entries) in enumerate(targets.items())
    }
    return SvskCheckpointConfig(config_groups=groups, ignore=ignore)


def test_round_trip_through_json() -> None:
    config = SvskCheckpointConfig.from_dict(EXAMPLE)
    assert json.loads(json.dumps(config.to_dict())) == EXAMPLE
    assert SvskCheckpointConfig.from_dict(config.to_dict()) == config


def test_defaults() -> None:
    config = SvskCheckpointConfig.from_dict(
        {"version": "1.0", "config_groups": {"a": {"targets": ["Linear"]}}}
    )
    assert config.to_dict() == {
        **EXAMPLE,
        "config_groups": {
            "a": {
                **group_0(EXAMPLE),
                "sidecar": {"rank": 0, "tile_m": 512, "tile_n": 1024, "num_bits": 8},
            }
        },
        "ignore": [],
        "producer": {},
    }


def test_writes_the_current_version() -> None:
    assert (
        SvskCheckpointConfig(config_groups={"a": make_group()}).to_dict()["version"]
        == FORMAT_VERSION
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw.update(colour="red"), ["colour", "unknown key", "red"]),
        (
            lambda raw: group_0(raw).update(wieghts={}),
            ["config_groups.group_0.wieghts", "unknown key"],
        ),
        (
            lambda raw: group_0(raw)["weights"].update(zero_point=1),
            ["group_0.weights.zero_point", "unknown key"],
        ),
        (
            lambda raw: group_0(raw)["sidecar"].update(tile_k=1),
            ["group_0.sidecar.tile_k", "unknown key"],
        ),
        (
            lambda raw: group_0(raw)["weights"].update(group_size=128),
            ["weights.group_size", "(16, 32, 64)", "128"],
        ),
        (
            lambda raw: group_0(raw)["weights"].update(group_size="64"),
            ["weights.group_size", "'64'"],
        ),
        (lambda raw: group_0(raw)["weights"].update(num_bits=3), ["weights.num_bits", "3"]),
        (
            lambda raw: group_0(raw)["weights"].update(symmetric=False),
            ["weights.symmetric", "False"],
        ),
        (lambda raw: group_0(raw)["weights"].update(type="float"), ["weights.type", "float"]),
        (
            lambda raw: group_0(raw)["weights"].update(strategy="channel"),
            ["weights.strategy", "channel"],
        ),
        (
            lambda raw: group_0(raw)["weights"].update(codebook="nf4"),
            ["weights.codebook", "quad8", "nf4"],
        ),
        (lambda raw: group_0(raw)["sidecar"].update(rank=513), ["sidecar.rank", "512", "513"]),
        (lambda raw: group_0(raw)["sidecar"].update(rank=-1), ["sidecar.rank", "-1"]),
        (lambda raw: group_0(raw)["sidecar"].update(rank=True), ["sidecar.rank", "True"]),
        (
            lambda raw: group_0(raw)["sidecar"].update(rank=3, num_bits=4),
            ["group_0.sidecar", "rank 3", "must be even"],
        ),
        (lambda raw: group_0(raw)["sidecar"].update(num_bits=6), ["sidecar.num_bits", "6"]),
        (lambda raw: group_0(raw)["sidecar"].update(tile_m=-1), ["sidecar.tile_m", "-1"]),
        (lambda raw: group_0(raw)["sidecar"].update(tile_n=1.5), ["sidecar.tile_n", "1.5"]),
        (lambda raw: group_0(raw).update(targets=[]), ["group_0.targets"]),
        (lambda raw: group_0(raw).pop("targets"), ["group_0.targets", "is missing"]),
        (
            lambda raw: group_0(raw).update(targets=["re:(q_proj"]),
            ["group_0.targets", "re:(q_proj", "regular expression"],
        ),
        (lambda raw: raw.update(ignore=["re:*"]), ["ignore.0", "re:*", "regular expression"]),
        (lambda raw: raw.update(config_groups={}), ["config_groups"]),
        (lambda raw: raw.pop("config_groups"), ["config_groups", "is missing"]),
        (
            lambda raw: raw.update(format="pack-quantized"),
            ["format", "expected svsk", "pack-quantized"],
        ),
        (lambda raw: raw.update(quant_method="awq"), ["quant_method", "expected svsk", "awq"]),
    ],
)
def test_refuses_and_names_the_key(change: Callable[[Raw], object], words: list[str]) -> None:
    with pytest.raises(SvskFormatError) as caught:
        SvskCheckpointConfig.from_dict(changed(change), "config.json: quantization_config")
    for word in [
        "config.json: quantization_config",
        *words,
        "docs/format.md lists the keys and values",
    ]:
        assert word in str(caught.value)


def test_every_schema_error_is_in_the_message() -> None:
    def change(raw: Raw) -> None:
        raw["colour"] = "red"
        group_0(raw)["weights"]["group_size"] = 128
        group_0(raw)["sidecar"]["rank"] = 513

    with pytest.raises(
        SvskFormatError, match=r"(?s)(?=.*colour)(?=.*group_size)(?=.*sidecar\.rank)"
    ):
        SvskCheckpointConfig.from_dict(changed(change))


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.37"])
def test_every_minor_version_is_read(version: str) -> None:
    config = SvskCheckpointConfig.from_dict({**EXAMPLE, "version": version})
    assert config.version == version  # kept: what is written back must not claim less


def test_recommended_activations_are_of_version_1_1() -> None:
    groups = {"g": ConfigGroup(targets=("Linear",))}
    exact = SvskCheckpointConfig(version="1.0", config_groups=groups).to_dict()
    assert "activations" not in exact
    assert exact["version"] == "1.0"
    stored = SvskCheckpointConfig(version="1.0", config_groups=groups, activations="int8").to_dict()
    assert (stored["activations"], stored["version"]) == ("int8", "1.1")
    assert SvskCheckpointConfig.from_dict(stored).activations == "int8"
    with pytest.raises(SvskFormatError, match=r"or activations, which are of version 1\.1"):
        SvskCheckpointConfig.from_dict({**stored, "version": "1.0"})
    with pytest.raises(SvskFormatError, match="activations"):
        SvskCheckpointConfig.from_dict({**stored, "activations": "fp8"})


@pytest.mark.parametrize(("rank", "version"), [(128, "1.0"), (129, "1.1"), (512, "1.1")])
def test_ranks_over_128_are_of_version_1_1(rank: int, version: str) -> None:
    """What is written says so, and what claims to be older is refused."""
    config = SvskCheckpointConfig(config_groups={"a": make_group(rank=rank)}).to_dict()
    assert config["version"] == version
    assert SvskCheckpointConfig.from_dict(config).config_groups["a"].sidecar.rank == rank
    older = {**config, "version": "1.0"}
    if version == "1.0":
        assert SvskCheckpointConfig.from_dict(older).version == "1.0"
    else:
        with pytest.raises(SvskFormatError, match=r"version 1\.0 with .*a rank over 128"):
            SvskCheckpointConfig.from_dict(older)


@pytest.mark.parametrize("version", ["0.9", "2.0", "10.0"])
def test_other_major_versions_are_refused(version: str) -> None:
    with pytest.raises(SvskFormatError) as caught:
        SvskCheckpointConfig.from_dict({**EXAMPLE, "version": version}, "here")
    for word in [
        "here",
        f"version {version}",
        f"svsk-vllm {__version__}",
        "version 1.x",
        "producer.svsk",
    ]:
        assert word in str(caught.value)


@pytest.mark.parametrize("version", [None, 1, 1.0, "1", "1.0.0", "v1.0", "1.", ".0", "", "1.-1"])
def test_malformed_versions_are_refused(version: object) -> None:
    with pytest.raises(
        SvskFormatError, match=r'expected a string "major\.minor" such as'
    ) as caught:
        SvskCheckpointConfig.from_dict({**EXAMPLE, "version": version})
    assert repr(version) in str(caught.value)


def test_a_missing_version_is_refused() -> None:
    with pytest.raises(SvskFormatError, match="version None"):
        SvskCheckpointConfig.from_dict(changed(lambda raw: raw.pop("version")))


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("targets", "winner"),
    [
        ({"a": ["Linear"], "b": [r"re:.*up_proj"]}, "b"),
        ({"a": [r"re:.*up_proj"], "b": ["Linear"]}, "a"),
        ({"a": [r"re:.*up_proj"], "b": [NAME]}, "b"),
        ({"a": [NAME], "b": ["Linear"], "c": ["re:.*"]}, "a"),
        ({"a": ["Linear", NAME], "b": ["re:.*"]}, "a"),  # the best of a group's matches counts
        ({"a": ["Linear", r"re:.*q_proj"], "b": [r"re:.*mlp"]}, "b"),
        ({"a": [r"re:mlp"], "b": ["Linear"]}, "b"),  # a pattern matches from the start
        ({"a": [r"re:model\.layers\.1\."], "b": ["Linear"]}, "a"),  # and need not reach the end
        ({"a": ["up_proj"], "b": ["Linear"]}, "b"),  # a name is the whole name
        ({"a": ["LinearBase"], "b": ["Linear"]}, "b"),
    ],
)
def test_name_before_pattern_before_class(targets: dict[str, list[str]], winner: str) -> None:
    config = make_config(targets)
    assert config.scheme_for(NAME) == config.config_groups[winner]


@pytest.mark.parametrize("entry", ["Linear", "re:.*up_proj", NAME])
def test_equally_good_matches_are_refused(entry: str) -> None:
    config = make_config({"first": [entry], "other": ["re:nothing"], "second": [entry]})
    with pytest.raises(SvskFormatError, match="equally well") as caught:
        config.scheme_for(NAME)
    assert NAME in str(caught.value)
    assert "first, second" in str(caught.value)


def test_ambiguity_below_the_best_match_does_not_matter() -> None:
    config = make_config({"a": ["Linear"], "b": ["Linear"], "c": ["re:.*up_proj"]})
    assert config.scheme_for(NAME) == config.config_groups["c"]


@pytest.mark.parametrize("entry", ["Linear", "re:.*mlp", NAME])
def test_ignore_beats_every_target(entry: str) -> None:
    config = make_config({"a": ["Linear"], "b": [NAME]}, ignore=(entry,))
    assert config.is_ignored(NAME)
    assert config.scheme_for(NAME) is None


@pytest.mark.parametrize("entry", ["up_proj", "re:mlp", "model.layers.1.mlp.up_pro", "LinearBase"])
def test_ignore_entries_that_do_not_match(entry: str) -> None:
    config = make_config({"a": ["Linear"]}, ignore=(entry,))
    assert not config.is_ignored(NAME)
    assert config.scheme_for(NAME) is not None


def test_a_module_that_no_group_matches() -> None:
    assert make_config({"a": ["re:.*q_proj"], "b": ["lm_head"]}).scheme_for(NAME) is None


def test_a_copy_looks_its_own_entries_up() -> None:
    config = make_config({"a": ["Linear"]})
    first = config.scheme_for(NAME)  # looked up, and kept
    assert first is not None
    other = make_config({"b": [NAME]}).config_groups
    changed = config.model_copy(update={"config_groups": other})
    assert changed.scheme_for("model.layers.0.mlp.up_proj") is None
    assert changed.scheme_for(NAME) == other["b"]
    ignoring = config.model_copy(update={"ignore": (NAME,)})
    assert ignoring.scheme_for(NAME) is None
    assert config.scheme_for(NAME) == first
    assert config == make_config({"a": ["Linear"]})  # whatever was looked up in one of them
    assert config.to_dict() == make_config({"a": ["Linear"]}).to_dict()
