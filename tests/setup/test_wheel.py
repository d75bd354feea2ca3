# SPDX-License-Identifier: Apache-2.0
"""What a wheel of the project holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Files of the wheel, built from a copy, because a build leaves folders behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if files.returncode:
        pytest.skip("not a checkout of git")
    for name in filter(None, files.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize(
    "name",
    [
        "svsk_kernels/cpu/linear.cpp",
        "svsk_kernels/cpu/linear_bf16.cpp",
        "svsk_kernels/cpu/linear_float.cpp",
        "svsk_kernels/cpu/linear.h",
        "svsk_kernels/cpu/int8_rows.h",
        "svsk_kernels/configs/README.md",
        "svsk_kernel_tools/bench/__main__.py",
        "svsk_vllm/format/architectures.json",
        "svsk_offline/recipes/best.yaml",
        "svsk_offline/calibration/texts/chat.txt",
        "svsk_eval/cli.py",
        "svsk_eval/report/report.html.j2",
    ],
)
def test_files_that_are_read_at_run_time_are_in_it(names: set[str], name: str) -> None:
    assert name in names


@pytest.mark.parametrize("folder", ["emulator", "binary"])
def test_tools_for_absent_gpus_are_not(names: set[str], folder: str) -> None:
    assert (ROOT / "kernels" / "svsk_kernel_tools" / folder).is_dir()
    assert not [name for name in names if f"svsk_kernel_tools/{folder}" in name]


def test_every_module_of_the_run_time_packages_is_in_it(names: set[str]) -> None:
    for root, package in (
        (".", "svsk_vllm"),
        ("kernels", "svsk_kernels"),
        ("offline", "svsk_offline"),
        ("eval", "svsk_eval"),
    ):
        modules = (ROOT / root / package).rglob("*.py")
        assert {str(path.relative_to(ROOT / root)) for path in modules} <= names
