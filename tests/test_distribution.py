"""`python -m build`: an sdist that is the tree, a wheel that is both packages; both run elsewhere."""

import fnmatch
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("cumo_kernels/", "cumo_model/")
# what setuptools writes into an sdist
GENERATED = ("PKG-INFO", "setup.cfg", "cumo.egg-info/*")
# this checkout and the network are out of reach, and nothing is compiled
ALONE = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
ALONE |= {
    "CUMO_BUILD": "0",
    "PIP_NO_INDEX": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "OMP_NUM_THREADS": "1",
}


def tree() -> list[str]:
    """The files that git tracks; in a copy without git all but those that .gitignore names."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    tracked = [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    if "pyproject.toml" in tracked:
        return tracked
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()] + [".git", *GENERATED]
    names = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    hidden = lambda name: any(fnmatch.fnmatch(part, word) for part in name.parts for word in ignored)
    return [name.as_posix() for name in names if not hidden(name)]


def run(*words: str | Path, cwd: Path, code: int = 0) -> str:
    done = subprocess.run(
        words, cwd=cwd, env=ALONE, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == code, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """ "sdist" and "wheel" of a clean copy; `build` makes the wheel from the sdist."""
    for needed in ("build", "setuptools", "wheel"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("built")
    for name in tree():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", "source", cwd=folder)
    sdist, wheel = sorted((folder / "dist").iterdir(), key=lambda path: path.suffix)
    return {"sdist": sdist, "wheel": wheel}


def test_the_wheel_is_both_packages(built):
    """Every file of theirs, byte for byte, and nothing else."""
    assert built["wheel"].name == f"cumo-{PROJECT['version']}-py3-none-any.whl"
    with zipfile.ZipFile(built["wheel"]) as wheel:
        about = f"cumo-{PROJECT['version']}.dist-info/"
        found = {name: wheel.read(name) for name in wheel.namelist()}
    metadata = message_from_bytes(found[f"{about}METADATA"])
    assert (metadata["Name"], metadata["Version"]) == ("cumo", PROJECT["version"])
    assert metadata["License-Expression"] == PROJECT["license"]
    assert found[f"{about}licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    ours = {name: (ROOT / name).read_bytes() for name in tree() if name.startswith(PACKAGES)}
    assert {f"{package}py.typed" for package in PACKAGES} <= ours.keys()
    inside = {name: value for name, value in found.items() if not name.startswith(about)}
    assert sorted(inside) == sorted(ours)
    assert inside == ours


def test_the_sdist_is_the_tree(built):
    """csrc/, tests, examples and all: what is unpacked can be tested as a clone can."""
    assert built["sdist"].name == f"cumo-{PROJECT['version']}.tar.gz"
    with tarfile.open(built["sdist"]) as archive:
        files = [member.name.partition("/")[2] for member in archive if member.isfile()]
        modes = {member.name.partition("/")[2]: member.mode for member in archive}
    generated = [name for name in files if any(fnmatch.fnmatch(name, pattern) for pattern in GENERATED)]
    assert sorted(set(files) - set(generated)) == sorted(tree())
    assert modes[".ci/run"] & 0o100


def empty_environment(folder: Path) -> Path:
    """A new virtual environment -> its Python. Of this one it sees what is not ours."""
    pytest.importorskip("pip")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    others = folder / "others"
    others.mkdir()
    for place in map(Path, sys.path):
        if place.name in ("site-packages", "dist-packages"):
            for item in place.iterdir():
                ours = item.name.startswith(("cumo", "__editable__")) or item.suffix == ".pth"
                if not ours and not (others / item.name).exists():
                    (others / item.name).symlink_to(item)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(f"{others}\n")
    return folder / "bin/python"


IMPORTED = """
import sys
from importlib import metadata
from pathlib import Path

import cumo_kernels, cumo_model
from cumo_model.__main__ import main

for package in (cumo_kernels, cumo_model):
    folder = Path(package.__file__).parent
    assert folder.is_relative_to(sys.prefix), folder
    assert (folder / "py.typed").is_file()
    assert all(hasattr(package, name) for name in package.__all__)
assert cumo_kernels.__version__ == metadata.version("cumo") == sys.argv[1]
for recipe in sys.argv[2:]:
    print(recipe, flush=True)
    assert main(["train", "--config", recipe, "variant=none of them"]) == 1
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_and_runs_in_an_empty_environment(kind, built, tmp_path):
    python = empty_environment(tmp_path / "environment")
    empty = tmp_path / "empty"
    empty.mkdir()
    run(python, "-c", "import torch, importlib.util as u; assert not u.find_spec('cumo_kernels')", cwd=empty)
    install = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    run(python, "-m", "pip", *install, built[kind], cwd=empty)

    recipes = [Path(name) for name in tree() if "/recipes/" in name and name.endswith(".yaml")]
    names = [f"{path.parent.name}/{path.stem}" for path in recipes if not path.name.startswith("_")]
    out = run(python, "-c", IMPORTED, PROJECT["version"], *names, cwd=empty)
    assert len(names) >= 9 and out.count("cumo: variant must be ") == len(names)  # read, with their bases
    for command in ([python, "-m", "cumo_kernels"], [python.with_name("cumo-kernels")]):
        assert "measured on CPUs" in run(*command, "explain", "--device", "cpu", cwd=empty)  # measured.json
    assert "upcycle" in run(python.with_name("cumo"), "--help", cwd=empty)
    assert "part of a checkout" in run(python, "-m", "cumo_kernels", "bench", cwd=empty, code=1)
