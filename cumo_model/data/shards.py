"""Members of uncompressed tar shards: names as in the unpacked folder, and places in the file."""

import os
import posixpath
import tarfile
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
    """The files of a shard in order; why other members cannot be read; whether the file ends too early."""

    members: list[Member]
    refused: dict[str, str]
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
    found = []
    for name, member in order:
        target: tarfile.TarInfo | None = member
        for _ in range(LINKS):
            if target is None or not (target.islnk() or target.issym()):
                break
            target = latest.get(_target(target))
        if target is not None and target.isreg() and not target.issparse():
            found.append(Member(name, target.offset_data, target.size))
        elif member.islnk() or member.issym():
            refused[name] = f"is a link to {member.linkname!r}, which is not a file of the same tar file"
        elif not member.isdir():
            refused[name] = "is a sparse file" if member.issparse() else "is not a regular file"
    return Shard(found, refused, bool(order) and _ends_early(path, order[-1][1]))


def _target(link: tarfile.TarInfo) -> str:
    if link.islnk():
        return member_name(link.linkname)
    return posixpath.normpath(posixpath.join(posixpath.dirname(member_name(link.name)), link.linkname))


def _ends_early(path: str | os.PathLike, last: tarfile.TarInfo) -> bool:
    """Whether the archive is truncated after the last member, which tarfile does not report."""
    size = 0 if last.isdir() or last.islnk() or last.issym() else last.size
    if os.path.getsize(path) < last.offset_data + size:
        return True
    with open(path, "rb") as file:
        file.seek(last.offset_data + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        return file.read(tarfile.BLOCKSIZE).strip(tarfile.NUL) != b""
