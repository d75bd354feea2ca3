# SPDX-License-Identifier: Apache-2.0
"""``svsk push`` against a hub on this machine: a folder arrives, if it is whole."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

from svsk_eval.cli import app
from svsk_kernels.errors import SvskError
from svsk_offline.push import push
from tests.support.local_hub import Hub, running_hub
from tests.support.tiny_models import write_random_svsk

REPOSITORY = "me/tiny-svsk"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with running_hub() as server:
        yield server


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_llama: Path) -> Path:
    return write_random_svsk(tiny_llama, tmp_path / "svsk")


def test_the_folder_arrives(hub: Hub, checkpoint: Path) -> None:
    (checkpoint / ".hidden").write_text("stays")
    address = push(checkpoint, REPOSITORY, private=True, endpoint=hub.url, token="t")
    assert address == f"{hub.url}/{REPOSITORY}/commit/0123"
    assert (hub.made[0]["name"], hub.made[0]["organization"]) == ("tiny-svsk", "me")
    assert {name: hub.files[name] for name in hub.files} == {
        path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != ".hidden"
    }


def test_what_is_not_whole_is_not_uploaded(hub: Hub, checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(SvskError, match="is not whole, so it is not uploaded"):
        push(checkpoint, REPOSITORY, endpoint=hub.url, token="t")
    assert not hub.made


def test_whoever_is_not_logged_in_is_told(
    hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(checkpoint / "no-token"))
    with pytest.raises(SvskError, match=r"^me/tiny-svsk: nobody is logged in. Run `hf auth login`"):
        push(checkpoint, REPOSITORY, endpoint=hub.url)
    assert not hub.made


def test_refusals_are_one_line(hub: Hub, checkpoint: Path) -> None:
    hub.refuse = True
    with pytest.raises(SvskError, match=r"the hub did not take it .*403") as refused:
        push(checkpoint, REPOSITORY, endpoint=hub.url, token="t")
    assert "\n" not in str(refused.value)
    for arguments, message in (
        (["push", checkpoint, "not a name"], "expected a name on the hub"),
        (["push", "nowhere", REPOSITORY], "no such folder"),
    ):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 1
        assert message in result.stderr
