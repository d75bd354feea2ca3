# SPDX-License-Identifier: Apache-2.0
"""The table of what is lost: the page says what the command says, and the command ends with it."""

from pathlib import Path

from typer.testing import CliRunner

from svsk_eval.cli import app
from svsk_offline.export.formats import FORMATS
from tests.offline.export.gguf_files import read_gguf, write_svsk

PAGE = Path(__file__).parents[3] / "docs" / "what-runs-where.md"


def test_the_page_has_the_table() -> None:
    part = PAGE.read_text(encoding="utf-8").partition("<!-- formats -->\n")[2]
    rows = part.partition("<!-- end")[0].splitlines()[2:]
    assert rows == [
        f"| `{f.name}` | {f.read_by} | {f.base} | {f.sidecar} | {f.tables} | {f.refused} |"
        for f in FORMATS.values()
    ]


def test_the_command(tmp_path: Path) -> None:
    svsk = write_svsk(tmp_path, "qwen2")
    lora = tmp_path / "lora.gguf"
    arguments = ["export", str(svsk), str(tmp_path / "out.gguf"), "--to", "gguf"]
    for overwrite in ([], ["--overwrite"]):
        result = CliRunner().invoke(app, [*arguments, "--lora", str(lora), *overwrite])
        assert result.exit_code == 0, result.output
        assert f"wrote {tmp_path / 'out.gguf'}\nwrote {lora}\n" in result.output
        assert FORMATS["gguf"].losses in result.output
    assert read_gguf(lora)[0]["general.type"] == "adapter"
    refused = CliRunner().invoke(app, [*arguments[:2], str(tmp_path / "d"), "--to", "dense"])
    assert refused.exit_code == 0, refused.output
    for option in ("--lora", "--template"):
        refused = CliRunner().invoke(
            app, [*arguments[:2], str(tmp_path / "e"), "--to", "dense", option, str(lora)]
        )
        assert refused.exit_code == 1
        assert f"{option}: goes with `--to gguf` only" in refused.output
