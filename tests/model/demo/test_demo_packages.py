"""Tests of the demo's packages without a network: downloads, checksums and error messages."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from cumo_model.demo import emoji, packages


@pytest.fixture
def registry(monkeypatch):
    """An npm that "downloads" known bytes; PACKAGES is pinned to them."""
    content = {package.tarball: package.tarball.encode() for package in packages.PACKAGES.values()}
    pinned = {
        short: packages.Package(
            p.name,
            p.version,
            hashlib.sha256(content[p.tarball]).hexdigest(),
            p.author,
            p.source,
            p.licence,
            p.licence_url,
        )
        for short, p in packages.PACKAGES.items()
    }
    monkeypatch.setattr(packages, "PACKAGES", pinned)
    calls = []

    def run(command, cwd=None, **_):
        specs = [word for word in command if "@" in word and not word.startswith("-")]
        calls.append(specs)
        for spec in specs:
            name, version = spec.rsplit("@", 1)
            tarball = f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
            (Path(cwd) / tarball).write_bytes(content[tarball])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.shutil, "which", lambda name: "/usr/bin/npm")
    monkeypatch.setattr(packages.subprocess, "run", run)
    return content, calls


def test_fetch_downloads_only_missing_packages(registry, tmp_path):
    _, calls = registry
    paths = packages.fetch(tmp_path)
    assert len(calls) == 1 and len(calls[0]) == 5
    assert packages.fetch(tmp_path) == paths and len(calls) == 1
    paths["noto"].write_bytes(b"damaged")
    packages.fetch(tmp_path)
    assert calls[1] == ["@iconify-json/noto@1.2.9"]
    assert paths["noto"].read_bytes() == b"iconify-json-noto-1.2.9.tgz"
    assert sorted(p.name for p in (tmp_path / "npm").iterdir()) == sorted(
        ["ATTRIBUTION.md", *(p.name for p in paths.values())]
    )


def test_a_wrong_checksum_keeps_nothing(registry, tmp_path):
    content, _ = registry
    content["iconify-json-noto-1.2.9.tgz"] = b"something else"
    with pytest.raises(
        RuntimeError, match=r"iconify-json-noto-1\.2\.9\.tgz: SHA-256 must be \w+, got \w+; nothing was kept"
    ):
        packages.fetch(tmp_path)
    assert not (tmp_path / "npm" / "iconify-json-noto-1.2.9.tgz").exists()


def test_the_error_without_a_network_names_cause_and_remedy(registry, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "npm error code ENOTFOUND\nnpm error network unreachable")
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        RuntimeError,
        match=r"npm could not fetch @iconify-json/noto@1\.2\.9 .*ENOTFOUND\): check the network",
    ):
        packages.fetch(tmp_path)


def test_without_npm_the_wheel_is_installed(registry, tmp_path, monkeypatch):
    _, calls = registry
    plain_run = packages.subprocess.run
    commands = []

    def run(command, **options):
        commands.append(command)
        if "pip" in command:
            Path(command[command.index("--target") + 1]).mkdir()
            return subprocess.CompletedProcess(command, 0, "", "")
        return plain_run(command, **options)

    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    monkeypatch.setattr(packages.subprocess, "run", run)
    packages.fetch(tmp_path)
    assert packages.NODE_WHEEL in commands[0] and "--no-deps" in commands[0]
    assert commands[1][0].startswith(str(tmp_path)) and commands[1][1].endswith("npm-cli.js")
    assert len(calls) == 1
    monkeypatch.setattr(
        packages.subprocess,
        "run",
        lambda *_, **__: subprocess.CompletedProcess([], 1, "", "ERROR: no network"),
    )
    with pytest.raises(RuntimeError, match=r"npm is not installed and pip could not fetch .*no network"):
        packages.fetch(tmp_path / "empty")


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CUMO_CACHE", str(tmp_path))
    assert packages.default_cache() == tmp_path
    monkeypatch.delenv("CUMO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packages.default_cache() == tmp_path / "cumo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packages.default_cache() == Path.home() / ".cache" / "cumo"


@pytest.mark.network
@pytest.mark.skipif(
    not os.environ.get("CUMO_NETWORK"), reason="set CUMO_NETWORK=1 to fetch 13 MB from the npm registry"
)
def test_the_real_packages_match_their_checksums(tmp_path):
    paths = packages.fetch(tmp_path)
    assert len(emoji.load(paths, "core")) > 800
