"""The pins: complete, equal in both files, and free of addresses."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.pins import environment_text, read_pins

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pins() -> list[str]:
    return read_pins((ROOT / "requirements.txt").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_environment_pip_section_equals_the_pins(pins: list[str]) -> None:
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    environment = yaml.safe_load(text)
    assert environment["name"] == "amortlib"
    assert environment["channels"] == ["conda-forge"]
    python, pip, pip_section = environment["dependencies"]
    assert (python, pip) == ("python=3.12", "pip")
    assert pip_section["pip"] == pins
    assert text == environment_text(pins), "environment.yml was edited by hand: run make pins"


def test_every_dependency_is_pinned_to_a_version_that_it_allows(
    pins: list[str], project: dict
) -> None:
    pinned = {}
    for line in pins:
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{line} is not a pin"
        pinned[canonicalize_name(requirement.name)] = specifier.version
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["book"], *extras["test"]]:
        wanted = Requirement(line)
        name = canonicalize_name(wanted.name)
        assert name in pinned, f"{line} of pyproject.toml has no pin: run make pins"
        assert wanted.specifier.contains(pinned[name], prereleases=True), (
            f"{name} is pinned to {pinned[name]}, which pyproject.toml ({line}) does not allow"
        )


def test_the_book_stays_on_the_line_that_reads_its_settings(pins: list[str]) -> None:
    (pin,) = [line for line in pins if line.startswith("jupyter-book==")]
    assert int(pin.removeprefix("jupyter-book==").split(".")[0]) < 2


@pytest.mark.parametrize("name", ["requirements.txt", "environment.yml"])
def test_no_address(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"://| @ |--(extra-)?index|--find-links|(^|\s)-[fei]\s", text)


def test_every_dependency_says_why() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text[text.index("\ndependencies = [") : text.index("[project.urls]")]
    lines = [line for line in section.splitlines() if line.startswith('  "')]
    assert len(lines) > 20
    for line in lines:
        assert re.search(r'",\s+# \w+.*', line), f"no reason beside {line.strip()}"
