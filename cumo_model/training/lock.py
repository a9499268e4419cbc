"""A lock on the folder of a run, so that two runs cannot train in it at once.

The lock is a POSIX record lock on a file. The kernel releases it when the process ends, however it ends, and
processes forked for data loading do not inherit it. Network file systems (NFS 4, Lustre, GPFS) pass it on to
other nodes, but not all do, or not as they are mounted. So the process that holds the lock also touches a
second file every few seconds; a process on another machine watches it for a while before it takes over.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cumo_model.model.full_disk import is_no_room

LOCK_FILE = ".lock"
HOLDER_FILE = ".running.json"  # who holds the lock; deleted at the end
BEAT = 5.0  # seconds between two touches
SILENT = 4 * BEAT  # seconds without a touch after which a holder on another machine has ended
NAMING = 2.0  # seconds for a process that has just locked to write who it is, or that ends to let go
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_held: set[str] = set()  # a record lock does not exclude the threads of one process


def machine() -> str:
    """A name of this machine since its last start; containers on one machine have the same kernel."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return boot or socket.gethostname()


@contextlib.contextmanager
def locked(run: str | os.PathLike) -> Iterator[None]:
    """Hold the lock of a run's folder inside the `with` block.

    Args:
        run: the folder; it is created.

    Raises:
        ValueError: another process holds the lock; the message says which one, on which machine.
    """
    run = Path(run)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_no_room(error):
            raise
        raise ValueError(f"output_dir must be a folder that can be made, got {str(run)!r}: {error}") from None
    key = os.path.realpath(run)
    if key in _held:
        raise ValueError(_in_use(run, f"process {os.getpid()}, which is this one"))
    with open(run / LOCK_FILE, "a") as file:
        if not _lock(file, run) or _holder(run).get("machine") != machine():
            _wait_for_silence(run)
        _held.add(key)
        stop = threading.Event()
        beats = threading.Thread(target=_touch, args=(run / HOLDER_FILE, stop), daemon=True)
        try:
            _write_holder(run)
            beats.start()
            yield
        finally:
            stop.set()
            if beats.is_alive():
                beats.join()
            with contextlib.suppress(OSError):
                (run / HOLDER_FILE).unlink()
            _held.discard(key)  # the lock ends as the file is closed


def _lock(file, run: Path) -> bool:
    """Lock a file; False if the file system has no locks."""
    end = time.monotonic() + NAMING
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in WITHOUT_LOCKS:
                return False
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        else:
            return True
        holder = _holder(run)
        if holder or time.monotonic() > end:
            raise ValueError(_in_use(run, name_of(holder)))
        time.sleep(0.05)


def _wait_for_silence(run: Path) -> None:
    """Wait until a holder that may not have seen the lock touches its file again, or is silent."""
    first = _stamp(run)
    if first is None:
        return
    print(
        f"{run} was last used by {name_of(_holder(run))}: waiting {SILENT:.0f} seconds to see whether it "
        "still runs",
        file=sys.stderr,
    )
    end = time.monotonic() + SILENT
    while time.monotonic() < end:
        time.sleep(BEAT / 5)
        now = _stamp(run)
        if now is None:
            return
        if now != first:
            raise ValueError(_in_use(run, name_of(_holder(run))))


def this_process() -> dict[str, str | int]:
    """What a lock says of the process that holds it."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "machine": machine(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": " ".join(sys.argv),
    }


def _write_holder(run: Path) -> None:
    path = run / HOLDER_FILE
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # of a process that has ended
    try:
        with open(path, "x") as file:  # only one of several processes succeeds
            json.dump(this_process(), file)
    except FileExistsError:
        raise ValueError(_in_use(run, name_of(_holder(run)))) from None


def _touch(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _stamp(run: Path) -> int | None:
    try:
        with open(run / HOLDER_FILE) as file:  # opening asks a network file system again
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _holder(run: Path) -> dict:
    try:
        found = json.loads((run / HOLDER_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def name_of(holder: dict) -> str:
    """The process that a lock names, in words."""
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"


def _in_use(run: Path, who: str) -> str:
    return f"{run} is in use by {who}: wait until it has finished, stop it, or choose another output_dir"
