# SPDX-License-Identifier: Apache-2.0
"""What a loader refuses a folder with: the first few problems, or that it cannot be looked at."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from svsk_vllm.architecture.folder_check import require_sound
from svsk_vllm.format import SvskFormatError
from tests.support.format_builders import edit_json
from tests.support.tiny_models import write_dense, write_random_svsk


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "nowhere"):
        with pytest.raises(
            SvskFormatError, match=rf"{name}: cannot be read \(.*\)\. Is it a folder that this user"
        ):
            require_sound(tmp_path / name, AutoConfig.for_model("llama"))


def test_a_folder_with_many_problems(tmp_path: Path) -> None:
    svsk = write_random_svsk(write_dense(tmp_path / "dense"), tmp_path / "svsk")
    config = AutoConfig.from_pretrained(svsk)
    require_sound(svsk, config)
    edit_json(svsk / "config.json", lambda config: config.update(intermediate_size=256))
    with pytest.raises(
        SvskFormatError, match=r" And \d+ more: `svsk validate .*/svsk`\.$"
    ) as refused:
        require_sound(svsk, config)
    assert "gate_proj" in str(refused.value)
