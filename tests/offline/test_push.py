# SPDX-License-Identifier: Apache-2.0
"""``svsk push`` against a hub on this machine: a folder arrives, if it is whole."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

from svsk_eval.cli import app
from svsk_kernels.errors import SvskError
from svsk_offline.push import push
from tests.support.tiny_models import write_random_svsk

REPOSITORY = "me/tiny-svsk"


class Hub(ThreadingHTTPServer):
    """As much of the hub's interface as an upload needs."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.refuse = False
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"error": "not here"}, 404)

    def do_POST(self) -> None:
        body, hub = self._body(), self.server
        if self.path == "/api/repos/create":
            if hub.refuse:
                self._answer({"error": "you may not"}, 403)
                return
            hub.made.append(json.loads(body))
            self._answer({"url": f"{hub.url}/{REPOSITORY}"})
        elif self.path == "/api/validate-yaml":
            self._answer({"warnings": [], "errors": []})
        elif self.path.endswith("/preupload/main"):
            self._answer(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if "safetensors" in file["path"] else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": one["oid"],
                    "size": one["size"],
                    "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}},
                }
                for one in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            url = f"{hub.url}/{REPOSITORY}/commit/0123"
            self._answer({"commitUrl": url, "commitOid": "0123", "success": True})
        else:
            self._answer({"error": self.path}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


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
