"""Members of uncompressed tar shards: names as in the unpacked folder, and places in the file."""

import os
import posixpath
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass

LINKS = 40  # that one name may lead through


@dataclass(frozen=True)
class Member:
    """A file in a shard, or a link to one: its name without `./`, and its content's place in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Shard:
    """The members of a shard.

    Attributes:
        members: files in order.
        refused: names of other members, and why they cannot be read.
        directories: names of symbolic links to directories of the shard.
        links: names of all symbolic links, and what they say (see `resolve`).
        ends_early: whether the file is truncated.
    """

    members: list[Member]
    refused: dict[str, str]
    directories: set[str]
    links: dict[str, str]
    ends_early: bool


def member_name(name: str) -> str:
    """The one spelling of a name in a shard: no `./`, no double or leading slash."""
    return posixpath.normpath(name.lstrip("/"))


def read_shard(path: str | os.PathLike) -> Shard:
    """List the members of a shard. Links, which tar makes of equal files, are followed inside the shard.

    Raises:
        OSError, tarfile.TarError: the file is not an uncompressed tar file.
    """
    refused: dict[str, str] = {}
    order: list[tuple[str, tarfile.TarInfo]] = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            order.append((member_name(member.name), member))
    latest = dict(order)
    links = {name: member.linkname for name, member in order if latest[name].issym() and member.issym()}
    parents = _parents(latest) if links else set()
    found, directories = [], set()
    for name, member in order:
        target: tarfile.TarInfo | None = member
        place: str | None = name
        for _ in range(LINKS):
            if target is None or not (target.islnk() or target.issym()):
                break
            place = resolve(member_name(target.linkname) if target.islnk() else place or "", links)
            target = latest.get(place or "")
        if target is not None and target.isreg() and not target.issparse():
            found.append(Member(name, target.offset_data, target.size))
        elif member.issym() and place in parents:
            directories.add(name)
        elif member.islnk() or member.issym():
            refused[name] = f"is a link to {member.linkname!r}, which is not a file of the same tar file"
        elif not member.isdir():
            refused[name] = "is a sparse file" if member.issparse() else "is not a regular file"
    ends_early = bool(order) and _ends_early(path, order[-1][1])
    return Shard(found, refused, directories, links, ends_early)


def _parents(names: Iterable[str]) -> set[str]:
    found = {"."}
    for name in names:
        while (name := posixpath.dirname(name)) and name not in found:
            found.add(name)
    return found


def resolve(name: str, links: dict[str, str]) -> str | None:
    """Where a name in a shard leads to through symbolic links; None if out of the shard or in a circle."""
    done: list[str] = []
    left, followed = name.split("/")[::-1], 0
    while left:
        part = left.pop()
        if part == ".." and not done:
            return None
        if part == "..":
            done.pop()
        elif part not in ("", "."):
            target = links.get("/".join([*done, part]))
            if target is None:
                done.append(part)
                continue
            followed += 1
            if followed > LINKS or target.startswith("/"):
                return None
            left += target.split("/")[::-1]
    return "/".join(done) or "."


def _ends_early(path: str | os.PathLike, last: tarfile.TarInfo) -> bool:
    """Whether the archive is truncated after the last member, which tarfile does not report."""
    size = 0 if last.isdir() or last.islnk() or last.issym() else last.size
    if os.path.getsize(path) < last.offset_data + size:
        return True
    with open(path, "rb") as file:
        file.seek(last.offset_data + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        return file.read(tarfile.BLOCKSIZE).strip(tarfile.NUL) != b""
