# SPDX-License-Identifier: Apache-2.0
"""Packing wheels for a GPU machine without a network and installing them, with tiny wheels."""

import base64
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / ".ci" / "gpu"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pack() -> ModuleType:
    return load("bundle")


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("install")
    monkeypatch.setattr(module, "PYTHON", sys.version_info[:2])
    return module


def digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def make_wheel(folder: Path, name: str, members: dict[str, bytes], wrong: str = "") -> Path:
    """A wheel that pip installs, with a command; RECORD lies about the member ``wrong``."""
    info = f"{name}-1.0.dist-info"
    members = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        f"{info}/entry_points.txt": f"[console_scripts]\n{name} = {name}:main\n".encode(),
    }
    rows = [
        f"{path},{digest(data + (b'!' if path == wrong else b''))},{len(data)}"
        for path, data in members.items()
    ]
    members[f"{info}/RECORD"] = ("\n".join([*rows, f"{info}/RECORD,,"]) + "\n").encode()
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return path


@pytest.fixture
def wheels(tmp_path: Path) -> list[Path]:
    code = {
        "alpha/__init__.py": b"VALUE = 7\n",
        "alpha/big_fa2.so": b"x" * 5000,
        "alpha/kept_fa3.so": b"y" * 5000,
    }
    return [
        make_wheel(tmp_path, "alpha", code),
        make_wheel(tmp_path, "beta", {"beta.py": b"import alpha\n"}),
    ]


# --- slimming ---


def test_a_slim_wheel_lacks_what_was_dropped_and_its_record_holds(
    pack: ModuleType, wheels: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "slim" / wheels[0].name
    out.parent.mkdir()
    assert pack.slim(wheels[0], out, ["alpha/*_fa2*"]) == ["alpha/big_fa2.so"]
    with zipfile.ZipFile(out) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_LZMA}
        assert "alpha/big_fa2.so" not in archive.namelist()
        assert "big_fa2" not in archive.read("alpha-1.0.dist-info/RECORD").decode()
        assert archive.read("alpha/kept_fa3.so") == b"y" * 5000
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_pattern_without_a_member_is_an_error(
    pack: ModuleType, wheels: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(
        pack.BundleError, match=r"alpha-1\.0.*no member is called alpha/fa9\*.*DROPPED"
    ):
        pack.slim(wheels[0], tmp_path / "out.whl", ["alpha/fa9*"])


def test_a_damaged_wheel_is_an_error(pack: ModuleType, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "alpha", {"alpha.py": b"1\n"}, wrong="alpha.py")
    with pytest.raises(pack.BundleError, match=r"RECORD says 'sha256=.*' of alpha\.py, found"):
        pack.slim(wheel, tmp_path / "out.whl")


# --- the pins ---


def test_the_pins_are_read_and_have_slim_rules(pack: ModuleType) -> None:
    pins = pack.read_pins(pack.REQUIREMENTS)
    assert pins["vllm"] == "vllm==0.26.0"
    assert {"pydantic", "compressed-tensors", "fastapi", "xgrammar"} <= pins.keys()
    assert not {"torch", "triton", "transformers", "numpy", "flashinfer-python"} & pins.keys()
    assert pack.DROPPED.keys() <= pins.keys()


def test_a_line_that_is_no_pin_is_refused(pack: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "needs.txt"
    path.write_text("alpha==1.0  # why\nbeta>=2\n")
    with pytest.raises(pack.SetupError, match=r"needs\.txt: expected name==version, got 'beta>=2'"):
        pack.read_pins(path)
    path.write_text("alpha==1.0\nAlpha==1.1\n")
    with pytest.raises(pack.SetupError, match="Alpha is pinned twice"):
        pack.read_pins(path)


def test_pip_is_asked_for_wheels_of_the_machine(
    pack: ModuleType, wheels: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs, folder, asked = tmp_path / "needs.txt", tmp_path / "wheels", []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        for wheel in wheels:
            shutil.copy(wheel, folder)
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(pack, "run_captured", run)
    needs.write_text("alpha==1.0\nbeta==1.0\n")
    assert [path.name for path in pack.download(needs, folder)] == [path.name for path in wheels]
    assert {
        "--no-deps",
        "--only-binary=:all:",
        "3.12",
        "manylinux_2_28_x86_64",
        "manylinux_2_35_x86_64",
    } <= {*asked[0]}
    needs.write_text("alpha==1.0\nbeta==1.1\n")
    with pytest.raises(
        pack.BundleError, match=r"does not hold .*: beta 1\.0, beta 1\.1\. Empty it"
    ):
        pack.download(needs, folder)


# --- parts ---


def test_parts_that_come_one_by_one_are_installed_when_all_are_there(
    pack: ModuleType,
    setup: ModuleType,
    wheels: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    size = sum(path.stat().st_size for path in wheels)
    parts = pack.bundle(wheels, tmp_path / "out", size // 3 + 1)
    assert [part.name for part in parts] == ["part-0", "part-1", "part-2"]
    where = ["--store", str(tmp_path / "store"), "--target", str(tmp_path / "site"), "--no-check"]
    assert setup.main([*where, str(parts[1])]) == setup.MISSING
    assert "lacks part-0, part-2 of 3 parts" in capsys.readouterr().out
    assert setup.main([*where, str(parts[2])]) == setup.MISSING
    assert "lacks part-0 of 3 parts" in capsys.readouterr().out
    assert setup.main([*where, str(parts[0])]) == 0
    assert f"{tmp_path / 'site'} PATH=" in capsys.readouterr().out
    code = (
        "import alpha, beta; from importlib.metadata import version; print(alpha.VALUE,"
        " version('beta'))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        check=True,
    )
    assert found.stdout.split() == [b"7", b"1.0"]
    assert setup.main(where) == 0, "the store has all parts"
    assert "installed" not in capsys.readouterr().out, "and the target is up to date"


def test_the_project_is_installed_beside_the_wheels(
    pack: ModuleType,
    setup: ModuleType,
    wheels: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (part,) = pack.bundle(wheels[:1], tmp_path / "out", 1_000_000)
    where = ["--store", str(tmp_path / "store"), "--target", str(tmp_path / "site"), "--no-check"]
    for _ in range(2):  # a project may have changed since: it is installed again
        assert setup.main([*where, "--project", str(wheels[1]), str(part)]) == 0
        assert f"installed {wheels[1]}" in (printed := capsys.readouterr().out)
    site, project = tmp_path / "site", tmp_path / "site.project"
    assert f"{site}:{project} PATH=" in printed
    assert f"PATH={site / 'bin'}:{project / 'bin'}:$PATH" in printed
    assert (site / "bin" / "alpha").is_file(), (
        "the project's commands must not replace those of the wheels"
    )
    assert (project / "bin" / "beta").is_file()


def test_damaged_parts_are_refused(
    pack: ModuleType,
    setup: ModuleType,
    wheels: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parts = pack.bundle(wheels, tmp_path / "out", 1_000_000)
    where = ["--store", str(tmp_path / "store"), "--target", str(tmp_path / "site"), "--no-check"]
    data = parts[0] / pack.DATA
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert setup.main([*where, str(parts[0])]) == 1
    assert "Bring it again" in capsys.readouterr().err
    data.write_bytes(whole)
    assert setup.main([*where, str(parts[0])]) == 0
    (tmp_path / "store" / "part-0").write_bytes(whole[:-1])
    assert setup.main(where) == 1
    assert "Bring it again" in capsys.readouterr().err


def test_a_folder_of_something_else_is_no_store(
    pack: ModuleType,
    setup: ModuleType,
    wheels: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (part,) = pack.bundle(wheels, tmp_path / "out", 1_000_000)
    (tmp_path / "store").mkdir()
    precious = tmp_path / "store" / "precious"
    precious.write_text("x")
    where = ["--store", str(tmp_path / "store"), "--target", str(tmp_path / "site"), "--no-check"]
    assert setup.main([*where, str(part)]) == 1
    assert "was not made by this script" in capsys.readouterr().err
    assert precious.read_text() == "x"


def test_another_bundle_takes_the_place_of_the_first(
    pack: ModuleType,
    setup: ModuleType,
    wheels: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = pack.bundle(wheels, tmp_path / "one", 1_000_000)
    second = pack.bundle(wheels[:1], tmp_path / "two", wheels[0].stat().st_size // 2 + 1)
    where = ["--store", str(tmp_path / "store"), "--target", str(tmp_path / "site"), "--no-check"]
    assert setup.main([*where, str(first[0])]) == 0
    assert (tmp_path / "site" / "beta.py").is_file()
    assert setup.main([*where, str(second[0])]) == setup.MISSING
    assert setup.main([*where, str(first[0]), str(second[1])]) == 1
    assert "the manifests differ" in capsys.readouterr().err
    assert setup.main([*where, str(second[1])]) == 0
    assert not (tmp_path / "site" / "beta.py").exists()
    assert len(pack.bundle(wheels, tmp_path / "two", 1_000_000)) == 1
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["part-0"], (
        "older parts are gone"
    )


def test_what_cannot_be_installed_is_said(
    pack: ModuleType,
    setup: ModuleType,
    wheels: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = ["--store", str(tmp_path / "store"), "--target", str(tmp_path / "site"), "--no-check"]
    assert setup.main([*where, str(tmp_path / "nowhere")]) == 1
    assert "nowhere/manifest.json does not exist" in capsys.readouterr().err
    (part,) = pack.bundle(wheels, tmp_path / "out", 1_000_000)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "mine").touch()
    assert setup.main([*where, str(part)]) == 1
    assert "was not made by this script" in capsys.readouterr().err
    assert (tmp_path / "site" / "mine").exists()
    setup.PYTHON = (2, 7)
    assert setup.main([*where, str(part)]) == 1
    assert "The wheels are for Python 2.7" in capsys.readouterr().err


def test_the_import_check_names_what_fails() -> None:
    check = load("check")
    found = check.failures(("json", "svsk_no_such_module"))
    assert list(found) == ["svsk_no_such_module"]
    assert "No module named" in found["svsk_no_such_module"]


def test_the_manifest_says_what_is_where(
    pack: ModuleType, wheels: list[Path], tmp_path: Path
) -> None:
    (part,) = pack.bundle(wheels, tmp_path / "out", 1_000_000)
    manifest = json.loads((part / pack.MANIFEST).read_text())
    assert [wheel["name"] for wheel in manifest["wheels"]] == [path.name for path in wheels]
    data = (part / pack.DATA).read_bytes()
    assert data == b"".join(path.read_bytes() for path in wheels)
    assert manifest["parts"] == [
        {"name": "part-0", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    ]
