# SPDX-License-Identifier: Apache-2.0
"""What a wheel of the project holds."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.wheels import build_wheel, tracked_files

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tracked_files(tmp_path_factory.mktemp("source"))


def names_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    return names_of(wheel)


def test_the_source_distribution_gives_the_same_wheel(
    source: Path, names: set[str], tmp_path: Path
) -> None:
    build = (
        "import setuptools.build_meta as meta, sys; print(meta.build_sdist(sys.argv[1]))",
        str(tmp_path),
    )
    subprocess.run([sys.executable, "-c", *build], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert names_of(build_wheel(archive, tmp_path)) == names


SMOKE = """
import sys
from importlib import metadata
from pathlib import Path
import svsk_eval, svsk_offline, svsk_kernels, svsk_vllm
from svsk_eval.task_data import tasks_folder
root = Path(sys.argv[1])
for package in (svsk_eval, svsk_offline, svsk_kernels, svsk_vllm):
    assert Path(package.__file__).is_relative_to(root), package
(found,) = metadata.distributions(name="svsk-vllm", path=[str(root)])
assert found.version == svsk_vllm.__version__, found.version
entries = {(entry.group, entry.name): entry.value for entry in found.entry_points}
assert entries["vllm.general_plugins", "svsk"] == "svsk_vllm:register", entries
assert entries["console_scripts", "svsk"] == "svsk_eval.cli:app", entries
assert list(root.glob("share/svsk_vllm/tasks/*.yaml")), "no tasks"
from svsk_eval.cli import app
app(["recipes", "best"])
"""


def test_an_installed_wheel_runs_and_names_itself_to_vllm(wheel: Path, tmp_path: Path) -> None:
    """In a folder of its own, before everything else that this environment can import."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(tmp_path), str(wheel)], check=True)
    run = subprocess.run(
        [sys.executable, "-P", "-c", SMOKE, str(tmp_path)],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[1] == "name: best"


@pytest.mark.parametrize("extras", ["", "[eval]"])
def test_installing_it_beside_vllm_changes_no_other_package(
    wheel: Path, tmp_path: Path, extras: str
) -> None:
    """pip may take nothing from an index here: whatever it wanted to change would end it."""
    pytest.importorskip("vllm")
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-index"]
    run = subprocess.run(
        [*command, "--report", str(report), f"{wheel}{extras}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    installed = json.loads(report.read_bytes())["install"]
    assert [one["metadata"]["name"] for one in installed] == ["svsk-vllm"]


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
        "svsk_eval/report/base.html.j2",
        "svsk_eval/report/parts.html.j2",
        "svsk_eval/checkpoint/page.html.j2",
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
