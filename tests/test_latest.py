"""Oldest and newest supported releases: all places that state them agree; the warning at import."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from cumo_kernels import versions
from tests import latest

ROOT = Path(__file__).parents[1]
PINS, LATEST = latest.pins(), latest.pins(latest.LATEST)


@pytest.mark.parametrize("package", [name for name in versions.TESTED if name != "Python"])
def test_what_is_called_tested_is_what_the_constraints_install(package):
    assert versions.TESTED[package] == (PINS[package], LATEST[package])
    requirement = re.search(rf'"({package}>=[^"]+?)[;"]', (ROOT / "pyproject.toml").read_text())[1]
    oldest, below = re.fullmatch(rf"{package}>=([\d.]+),<(\d+)", requirement).groups()
    assert versions.minor(PINS[package]) == versions.minor(oldest)
    assert int(below) == versions.minor(LATEST[package])[0] + 1
    row = f"| {package} | {PINS[package]} | {LATEST[package]} |"
    assert row in (ROOT / "docs/versions.md").read_text()


def test_every_python_is_named_alike():
    oldest, newest = versions.TESTED["Python"]
    project = (ROOT / "pyproject.toml").read_text()
    assert (oldest, newest) == (latest.PYTHONS[0], latest.PYTHONS[-1])
    assert f'requires-python = ">={oldest}"' in project
    assert f"| Python | {oldest} | {newest} |" in (ROOT / "docs/versions.md").read_text()


def test_the_warning_comes_before_what_a_new_release_may_break(tmp_path):
    """A future torch, from which a name that this project imports has been removed."""
    (tmp_path / "torch-9.9.dist-info").mkdir()
    (tmp_path / "torch-9.9.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n"
    )
    (tmp_path / "torch.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import cumo_kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode and "Error" in done.stderr
    newest = versions.TESTED["torch"][1]
    assert f"torch 9.9 (tested up to {newest}; to go back: pip install" in done.stderr


def test_every_pin_has_a_newest_release():
    assert set(PINS) - set(LATEST) == {latest.FROM_SOURCE, *latest.PAGE}
    assert re.search(r"on 20\d\d-\d\d-\d\d for Python 3.11 to 3.13", latest.LATEST.read_text())


def test_latest_stays_within_our_bounds_and_says_what_pip_says(monkeypatch):
    assert latest.bounded(["pillow", "transformers"])[0] == "pillow"
    assert re.fullmatch(r"transformers>=[\d.]+,<\d+", latest.bounded(["pillow", "transformers"])[1])
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(SystemExit, match=r"(?s)is not changed\n.*No matching distribution found for pillow"):
        latest.resolve("3.12", ["pillow"])


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
