"""Write constraints-latest.txt: the versions that pip would install today of all packages of constraints.txt.

python -m tests.latest        make latest; takes a minute, installs nothing
"""

import itertools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS, LATEST = ROOT / "constraints.txt", ROOT / "constraints-latest.txt"
PYTHONS = ("3.11", "3.12", "3.13")
FROM_SOURCE = "deepspeed"  # pip would have to build it to read its metadata
PAGE = ("gradio", "playwright")  # gradio refuses the newest Pillow
ALONE = "mistral-common"  # its requirements limit other packages; `make setup` installs it without them
HEAD = """\
# What pip brought on {day} for Python {first} to {last}, of every package that constraints.txt pins:
# written by `make latest`, used by `make test-latest`. cumo_kernels/versions.py names its torch, triton and
# transformers as the newest tested.
"""


def pins(file: Path = PINS) -> dict[str, str]:
    """Package -> version in a constraints file, in its order; for several markers, the last version."""
    lines = (line.split("#")[0].split(";")[0].strip() for line in file.read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def bare(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0]


def bounded(names: Iterable[str]) -> list[str]:
    """Requirements of the packages for pip, with the bounds of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    bounds = {normal(bare(text)): text.split(";")[0].strip() for text in asked if "<" in text}
    return [bounds.get(normal(name), name) for name in names]


def resolve(python: str, names: list[str], *options: str) -> dict[str, str]:
    """Normalised name -> version that pip would install of each of `names` on this Python."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", *options]
    command += ["--disable-pip-version-check", "--python-version", python, "--only-binary=:all:"]
    command += ["--target", "unused", "--report", "-", *names]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"latest: pip failed for Python {python}; {LATEST.name} is not changed\n{done.stderr}"
        )
    report = json.loads(done.stdout)
    found = {normal(row["metadata"]["name"]): row["metadata"]["version"] for row in report["install"]}
    return {normal(bare(name)): found[normal(bare(name))] for name in names}


def lines(resolved: dict[str, dict[str, str]], names: list[str]) -> list[str]:
    """Constraints of `names`; a release that is not available for every Python has a marker."""
    rows = []
    for name in names:
        versions = {python: found[normal(name)] for python, found in resolved.items()}
        if len(set(versions.values())) == 1:
            rows.append(f"{name}=={versions[PYTHONS[0]]}")
        else:
            rows += [f'{name}=={version}; python_version == "{p}"' for p, version in versions.items()]
    return rows


def main() -> int:
    names = [name for name in pins() if name not in (FROM_SOURCE, *PAGE)]
    together = [name for name in names if name != ALONE]
    resolved = {}
    for python in PYTHONS:
        print(f"asking pip for Python {python}", flush=True)
        resolved[python] = resolve(python, bounded(together)) | resolve(python, [ALONE], "--no-deps")
    head = HEAD.format(day=datetime.now(UTC).date(), first=PYTHONS[0], last=PYTHONS[-1])
    part = LATEST.with_suffix(".part")
    part.write_text(head + "\n".join(lines(resolved, names)) + "\n")
    part.replace(LATEST)
    print(f"written: {LATEST.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
