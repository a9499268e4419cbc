"""Both ends of the releases that cumo runs with: where they are written down, what is said of newer ones."""

import re
import warnings
from pathlib import Path

import pytest

from cumo_kernels import versions
from tests import latest

ROOT = Path(__file__).parents[1]
PINS, LATEST = latest.pins(), latest.pins(latest.LATEST)


@pytest.mark.parametrize("package", versions.TESTED)
def test_what_is_called_tested_is_what_the_constraints_install(package):
    assert versions.TESTED[package] == (PINS[package], LATEST[package])
    requirement = re.search(rf'"({package}>=[^"]+?)[;"]', (ROOT / "pyproject.toml").read_text())[1]
    oldest, below = re.fullmatch(rf"{package}>=([\d.]+),<(\d+)", requirement).groups()
    assert versions.minor(PINS[package]) == versions.minor(oldest)
    assert int(below) == versions.minor(LATEST[package])[0] + 1
    row = f"| {package} | {PINS[package]} | {LATEST[package]} |"
    assert row in (ROOT / "docs/versions.md").read_text()


def test_every_pin_has_a_newest_release():
    assert set(PINS) - set(LATEST) == {latest.FROM_SOURCE}
    assert re.search(r"on 20\d\d-\d\d-\d\d for Python 3.11 to 3.13", latest.LATEST.read_text())


def test_a_release_that_not_every_python_gets_has_a_marker():
    resolved = {python: {"torch": "2.15.0", "numpy": "2.5"} for python in latest.PYTHONS}
    resolved["3.11"] = {"torch": "2.15.0", "numpy": "2.4"}
    assert latest.lines(resolved, ["torch", "numpy"]) == [
        "torch==2.15.0",
        'numpy==2.4; python_version == "3.11"',
        'numpy==2.5; python_version == "3.12"',
        'numpy==2.5; python_version == "3.13"',
    ]


@pytest.mark.parametrize(
    ("found", "is_newer"),
    [(None, False), ("2.11.0+cu130", False), ("2.15.9", False), ("2.16.0a0+git1", True), ("3.0", True)],
)
def test_one_warning_names_what_is_newer_than_tested(monkeypatch, found, is_newer):
    monkeypatch.setattr(versions, "TESTED", {"torch": ("2.11.0", "2.15.0"), "triton": ("3.6.0", "3.9.0")})
    monkeypatch.setattr(versions, "installed", {"torch": found, "triton": "3.9.1"}.get)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        versions.warn_of_untested()
    assert len(caught) == is_newer
    if is_newer:
        (message,) = (str(warning.message) for warning in caught)
        assert f'torch {found} (tested up to 2.15.0; to go back: pip install "torch<2.16")' in message
        assert "triton" not in message
