# SPDX-License-Identifier: Apache-2.0
"""A package of another version in a folder of its own, in front of what an environment holds.

``pip install --target FOLDER --no-deps`` takes seconds where an environment takes minutes. What the
package then needs in another version than the environment has is put into the same folder, until
nothing is missing.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.version import Version
from setup_env import distributions, normalised, pip_command, write_vllm_shim

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

    from packaging.specifiers import SpecifierSet

NEVER_IN_FRONT = {"torch", "setuptools", "torchvision", "torchaudio", "torchcodec"}
"""Stay as the environment has them.

The first decides what runs at all, the others are absent or do not matter.
"""

ROUNDS = 10


class OverlayError(Exception):
    """The version cannot be had, or not beside what the environment holds; the message says why."""


def requirements(project: Mapping[str, Any]) -> dict[str, SpecifierSet]:
    """Bounds by normalised name from the table ``project``, its extras included."""
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = [Requirement(line) for lines in lists for line in lines]
    return {normalised(requirement.name): requirement.specifier for requirement in wanted}


def released(package: str, python: Path) -> list[Version]:
    """Every released version that pip offers this Python, the oldest first.

    Raises:
        OverlayError: pip names none.
    """
    command = [str(python), "-m", "pip", "index", "versions", package]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Available versions: (.*)", result.stdout)
    if found is None:
        raise OverlayError(
            f"pip index versions {package}: {(result.stderr or result.stdout).strip()[-300:]}"
        )
    return sorted(Version(word.strip()) for word in found.group(1).split(","))


def bounds(package: str, allowed: SpecifierSet, versions: list[Version]) -> tuple[Version, Version]:
    """The oldest and the newest version that the project allows.

    Raises:
        OverlayError: there is none.
    """
    within = [version for version in versions if version in allowed and not version.is_prerelease]
    if not within:
        raise OverlayError(f"{package}: no released version is within {allowed}")
    return within[0], within[-1]


def unmet(folder: Path, environment: Mapping[str, str]) -> list[Requirement]:
    """Requirements of the packages in the folder that neither it nor the environment meets.

    Args:
        folder: the overlay.
        environment: version by normalised name of what lies behind it.
    """
    inside = distributions(folder)
    have = {**environment, **{name: dist.version for name, dist in inside.items()}}
    wanted = []
    for dist in inside.values():
        for requirement in map(Requirement, dist.requires or ()):
            name = normalised(requirement.name)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            # Both builds of torch will do where "+cpu" is asked for.
            found = [have[name], f"{Version(have[name]).public}+cpu"] if name in have else []
            if applies and not any(
                requirement.specifier.contains(version, prereleases=True) for version in found
            ):
                wanted.append(requirement)
    return wanted


def build(package: str, version: Version, folder: Path, python: Path) -> list[str]:
    """Put a version of a package into the folder, and what it needs that ``python`` has not.

    Returns:
        What else went into the folder, as "name version".

    Raises:
        OverlayError: pip fails, or the package does not run with the environment's torch.
    """
    here = {
        normalised(dist.name): dist.version
        for dist in importlib.metadata.distributions()
        if dist.name
    }
    _install(f"{package}=={version}", folder, python)
    for _ in range(ROUNDS):
        wanted = unmet(folder, here)
        torch = [requirement for requirement in wanted if requirement.name == "torch"]
        if torch:
            raise OverlayError(
                f"{package} {version} needs {torch[0]}, and torch {here.get('torch', '(none)')} is"
                " there"
            )
        wanted = [
            requirement
            for requirement in wanted
            if normalised(requirement.name) not in NEVER_IN_FRONT
        ]
        if not wanted:
            break
        for requirement in wanted:
            _install(f"{requirement.name}{requirement.specifier}", folder, python)
    else:
        raise OverlayError(
            f"{package} {version}: its needs do not settle: {', '.join(map(str, wanted))}"
        )
    others = {
        name: dist.version
        for name, dist in distributions(folder).items()
        if name != normalised(package)
    }
    write_vllm_shim(folder)
    return [f"{name} {others[name]}" for name in sorted(others)]


def _install(requirement: str, folder: Path, python: Path) -> None:
    command = pip_command(python, ["--no-deps", "--upgrade", "--target", str(folder), requirement])
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise OverlayError(f"pip install {requirement}: {result.stderr.strip()[-500:]}")
