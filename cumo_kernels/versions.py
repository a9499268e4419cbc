"""The versions of other packages that cumo is tested with, and a warning if a newer one is installed."""

import platform
import re
import warnings
from importlib import metadata

# package -> oldest and newest release tested, as constraints.txt and constraints-latest.txt pin them
TESTED = {
    "Python": ("3.11", "3.13"),
    "torch": ("2.11.0", "2.15.0"),
    "triton": ("3.6.0", "3.9.0"),
    "transformers": ("5.17.0", "5.24.0"),
}


def installed(package: str) -> str | None:
    """Version of an installed package, or None; "Python" is one."""
    if package == "Python":
        return platform.python_version()
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def minor(version: str) -> tuple[int, ...]:
    """(2, 15) of "2.15.0+cu130": the part in which an incompatible change can be expected."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def series(version: str) -> str:
    """ "2.15" of "2.15.0+cu130"."""
    return ".".join(map(str, minor(version)))


def untested(package: str) -> str | None:
    """A message for a package whose installed release is newer than the newest tested, else None."""
    found, newest = installed(package), TESTED[package][1]
    if found is None or minor(found) <= minor(newest):
        return None
    major, number = minor(newest)
    back = f'to go back: pip install "{package}<{major}.{number + 1}"'
    return f"{package} {found} (tested up to {newest}{'' if package == 'Python' else f'; {back}'})"


def warn_of_untested() -> None:
    """Issue one UserWarning that names every package newer than the newest tested release."""
    found = [words for package in TESTED if (words := untested(package)) is not None]
    if found:
        warnings.warn(
            f"newer than what this cumo was tested with: {'; '.join(found)}. It may well work; if it does "
            "not, see docs/versions.md on how to report it",
            stacklevel=3,
        )
