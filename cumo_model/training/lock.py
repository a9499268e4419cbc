"""A lock on the folder of a run, so that two runs cannot train in it at once.

The lock is a POSIX record lock on a file. The kernel releases it when the process ends, however it ends, and
processes forked for data loading do not inherit it. Network file systems (NFS 4, Lustre, GPFS) pass it on to
other nodes, but not all do, or not as they are mounted. So the process that holds the lock also counts up a
number in a second file; a process on another machine watches it for a while before it takes over.
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

from cumo_model.checkpoints.folders import write_json

LOCK_FILE = ".lock"
HOLDER_FILE = ".running.json"  # who holds the lock, and a number that counts up; deleted at the end
BEAT = 5.0  # seconds between two counts
SILENT = 4 * BEAT  # seconds without a count after which a holder on another machine has ended
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_held: set[str] = set()  # a record lock does not exclude the threads of one process


def machine() -> str:
    """A name of this machine since its last start; containers on one machine have the same kernel."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{boot or socket.gethostname()}"


@contextlib.contextmanager
def locked(run: str | os.PathLike) -> Iterator[None]:
    """Hold the lock of a run's folder inside the `with` block.

    Args:
        run: the folder; it is created.

    Raises:
        ValueError: another process holds the lock; the message says which one, on which machine.
    """
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    key = os.path.realpath(run)
    if key in _held:
        raise ValueError(_in_use(run, f"process {os.getpid()}, which is this one"))
    with open(run / LOCK_FILE, "a") as file:
        _lock(file, run)
        _wait_for_silence(run)
        _held.add(key)
        stop = threading.Event()
        content = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "machine": machine(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": " ".join(sys.argv),
        }
        beats = threading.Thread(target=_count, args=(run / HOLDER_FILE, content, stop), daemon=True)
        try:
            write_json(run / HOLDER_FILE, {**content, "beat": 0})
            beats.start()
            yield
        finally:
            stop.set()
            if beats.is_alive():
                beats.join()
            with contextlib.suppress(OSError):
                (run / HOLDER_FILE).unlink()
            _held.discard(key)  # the lock ends as the file is closed


def _lock(file, run: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:  # then only the count tells
            return
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise ValueError(_in_use(run, _name(_holder(run)))) from None


def _wait_for_silence(run: Path) -> None:
    """Wait until a holder on another machine, which may not see the lock, counts or is silent."""
    found = _holder(run)
    if found is None or found.get("machine") == machine():
        return
    print(
        f"{run} was last used by {_name(found)}: waiting {SILENT:.0f} seconds to see whether it still runs",
        file=sys.stderr,
    )
    end = time.monotonic() + SILENT
    while time.monotonic() < end:
        time.sleep(BEAT / 5)
        now = _holder(run)
        if now is None:
            return
        if (now.get("machine"), now.get("pid"), now.get("beat")) != (
            found.get("machine"),
            found.get("pid"),
            found.get("beat"),
        ):
            raise ValueError(_in_use(run, _name(now)))


def _count(path: Path, content: dict, stop: threading.Event) -> None:
    number = 0
    while not stop.wait(BEAT):
        number += 1
        with contextlib.suppress(OSError):  # a full disk does not end the run
            write_json(path, {**content, "beat": number})


def _holder(run: Path) -> dict | None:
    try:
        # a file that is opened is read again from a network file system
        found = json.loads((run / HOLDER_FILE).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _name(holder: dict | None) -> str:
    if holder is None:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"


def _in_use(run: Path, who: str) -> str:
    return f"{run} is in use by {who}: wait until it has finished, stop it, or choose another output_dir"
