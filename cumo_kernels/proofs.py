"""Which backend is trusted on this GPU, and why: verified.json, or else a self-check that has run here.

On a GPU that verified.json does not know, the first eager call in a dtype has what comes next checked
(selfcheck.py) in a process of its own with a time limit: a wrong value, an exception, a hang, an abort or a
lost device costs the caller nothing but the backend. Verdicts are kept in

    $CUMO_CACHE/self_check.json, or ~/.cache/cumo/self_check.json:
    [{"gpu": ..., "capability": 90, "driver": ..., "torch": ..., "triton": ..., "code": ..., "switches": ...,
      "source": ..., "built": ..., "backend": "triton", "op": "expert_mlp", "dtype": "bfloat16",
      "passed": true, "cases": 3, "date": "2026-11-28", "reason": "", "command": ""}]

and one counts while everything before "backend" is as it was: code is the architecture whose machine code
runs, switches what chooses other code, source the hash of the files that decide what the backend computes,
built that of the csrc/ which `_C` was built from. One process of a machine checks and the others wait for it.
While a graph is captured or compiled nothing is checked: a backend without a verdict is not taken there.

`CUMO_SELF_CHECK=0`: nothing is checked; what is kept still counts.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

from cumo_kernels import extension, verified
from cumo_kernels.hardware import gpu_of
from cumo_kernels.verified import COVERS, Proof

SECONDS = 240.0  # of all that one call waits for
CASE_SECONDS = 60.0  # of one case, its compilation included
HEAD_START = 10.0  # seconds in which local rank 0 may take the lock before the others of its node
FILE = "self_check.json"
AHEAD = "python -m cumo_kernels self-check"
VERDICT = ("source", "built", "passed", "cases", "date", "reason", "command")  # what a newer row may change
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
Group = tuple[str, str]  # backend, op of a case
# python -m cumo_kernels for this very package, wherever the caller has it from, in whatever folder he is
MAIN = f"""import sys
{str(verified.ROOT)!r} in sys.path or sys.path.insert(0, {str(verified.ROOT)!r})
from cumo_kernels import __main__
raise SystemExit(__main__.main())"""
COMMAND = (sys.executable, "-P", "-c", MAIN)

_lock = threading.RLock()
_settled: dict[tuple, tuple[Proof, ...]] = {}
_here: list[dict] = []  # rows of this process, where none can be kept
_why: dict[tuple[str, str, str], str] = {}  # backend, op of a case, dtype -> why a check came to no verdict
_said: set[str] = set()


def folder() -> Path | None:
    """Where verdicts are kept; None for a user without a home."""
    if asked := os.environ.get("CUMO_CACHE"):
        return Path(asked)
    try:
        return Path.home() / ".cache" / "cumo"
    except RuntimeError:
        return None


def file() -> Path | None:
    return None if (place := folder()) is None else place / FILE


def forget() -> None:
    """What this process knows: the next call reads the file."""
    for known in (_settled, _here, _why, _said):
        known.clear()
    identity.cache_clear()


def turned_off() -> bool:
    """Whether nothing is to be checked.

    Raises:
        ValueError: CUMO_SELF_CHECK is neither 0 nor 1.
    """
    asked = os.environ.get("CUMO_SELF_CHECK") or "1"
    if asked not in ("0", "1"):
        raise ValueError(f"CUMO_SELF_CHECK must be 0 or 1, got {asked!r}")
    return asked == "0"


@cache
def driver() -> str:
    """Version of NVIDIA's driver; "" if it cannot be told."""
    with contextlib.suppress(OSError):
        for word in Path("/proc/driver/nvidia/version").read_text().split():
            if word[0].isdigit() and "." in word:
                return word
    return verified.first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


@cache
def identity(backend: str, device: torch.device) -> dict:
    """What a verdict depends on."""
    gpu, built = gpu_of(device), ""
    if backend == "cuda" and not (extension.EMULATE or extension.JIT):
        built = getattr(extension.load(), "source", "unknown")
    return {
        "gpu": gpu.name,
        "capability": gpu.capability,
        "driver": driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": verified.triton_version(),
        "code": extension.code_for(device) if backend == "cuda" else "",
        "switches": " ".join(verified.other_code()),
        "source": verified.source_of(backend) or "",
        "built": built,
    }


def _rows(path: Path | None) -> list[dict]:
    """What is kept; a file that is missing or damaged says nothing."""
    try:
        rows = json.loads(path.read_text()) if path is not None else []
        names = {*VERDICT, "backend", "op", "dtype", "gpu"}
        return [row for row in rows if names <= row.keys() and isinstance(row["passed"], bool)]
    except (OSError, ValueError, TypeError, AttributeError):
        return []


def _kept(path: Path | None, backend: str, dtype: str, device: torch.device) -> dict[str, dict]:
    """op of a case -> the verdict on it that counts here and now."""
    mine = {**identity(backend, device), "backend": backend, "dtype": dtype}.items()
    return {row["op"]: row for row in [*_rows(path), *_here] if mine <= row.items()}


def keep(path: Path | None, new: list[dict]) -> None:
    """Put `new` in place of what other sources had on the same machine, in one move; failing that, here."""
    place = lambda row: sorted((name, str(value)) for name, value in row.items() if name not in VERDICT)
    taken = [place(row) for row in new]
    rows = [row for row in _rows(path) if place(row) not in taken] + new
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    try:
        if path is None:
            raise OSError("there is no home and CUMO_CACHE is not set")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        _here.extend(new)
        _say(f"verdicts of the self-check are not kept, the next process checks again: {error}")


@contextlib.contextmanager
def alone(path: Path | None) -> Iterator[None]:
    """One process of those that share the file checks; the lock goes with its process.

    Where nothing can be locked, or whoever has it takes longer than a check may, each checks for itself.
    """
    try:
        import fcntl  # not on Windows

        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".lock").open("a")
    except (OSError, ImportError, AttributeError):
        yield
        return
    with file:
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        begin = time.monotonic()
        while time.monotonic() < begin + SECONDS + CASE_SECONDS:
            # those who let others go first only look, and may do so side by side
            first = first or time.monotonic() > begin + HEAD_START
            try:
                fcntl.flock(file, (fcntl.LOCK_EX if first else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                if first:
                    break
                fcntl.flock(file, fcntl.LOCK_UN)
            except BlockingIOError:
                first = True  # one checks, or looks
            except OSError:  # a file system without locks
                break
            time.sleep(0.1)
        yield


def _say(line: str) -> None:
    """Once in a process."""
    if line not in _said:
        _said.add(line)
        print(f"cumo_kernels: {line}", file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Once in a process."""
    if line not in _said:
        _said.add(line)
        warnings.warn(line, stacklevel=2)


def proofs(
    backends: tuple[str, ...], op: str, dtype: torch.dtype, device: torch.device, may_check: bool
) -> tuple[Proof, ...]:
    """For each of `backends`, whether it is trusted with the call `op` of dispatch.OPS on `device`, and why.

    `may_check`: False while a graph is being compiled or captured, and for questions that are no call.
    """
    key = backends, op, dtype, device
    if (known := _settled.get(key)) is not None:
        return known
    with _lock:
        found = {name: verified.proof(name, op, dtype, device) for name in backends}
        unknown = [name for name in backends if found[name].passed is None]
        if unknown:
            try:
                own = _own(unknown, op, dtype, device, may_check)
            except ValueError:
                raise
            except Exception as error:  # what the machine lacks for a check is no fault of the caller's
                words = f"its self-check could not run, {type(error).__name__}: {error}"
                own = dict.fromkeys(unknown, Proof(None, words))
            for name, verdict in own.items():
                shipped = f"{found[name].words}; " if verdict.passed is None else ""
                found[name] = verdict._replace(words=shipped + verdict.words)
        answer = tuple(found[name] for name in backends)
        if all(verdict.is_final for verdict in answer):
            _settled[key] = answer
        return answer


def _own(
    backends: list[str], op: str, dtype: torch.dtype, device: torch.device, may_check: bool
) -> dict[str, Proof]:
    """This machine's own verdict on each, or why there is none."""
    name = str(dtype).removeprefix("torch.")
    path = file()
    asked = [case for case, calls in COVERS.items() if op in calls]
    # a layer's other ops will be asked for next; sorting alone comes in the dtype of somebody's weights
    more = list(COVERS) if device.type == "cuda" and op != "sort_by_expert" else asked
    kept = lambda: {backend: _kept(path, backend, name, device) for backend in backends}

    def missing(rows: dict[str, dict], cases: list[str]) -> list[Group]:
        return [
            (backend, case)
            for backend in backends
            for case in cases
            if case not in rows[backend] and (backend, case, name) not in _why
        ]

    rows, off = kept(), turned_off()
    if missing(rows, asked) and may_check and not off:
        with alone(path):
            if groups := missing(kept(), more):
                keep(path, check(groups, dtype, device))
        rows = kept()
    found: dict[str, Proof] = {}
    for backend in backends:
        lacking = [case for case in asked if case not in rows[backend]]
        if not lacking:
            found[backend] = _verdict(backend, asked, rows[backend])
        elif known := [_why[group] for case in lacking if (group := (backend, case, name)) in _why]:
            found[backend] = Proof(None, f"its self-check came to no verdict: {known[0]}")
        elif off:
            found[backend] = Proof(None, "CUMO_SELF_CHECK=0 keeps it from being checked")
        else:
            words = f"its self-check has not run yet: the first eager call, or {AHEAD}"
            found[backend] = Proof(None, words, is_final=False)
    return found


def _verdict(backend: str, asked: list[str], rows: dict[str, dict]) -> Proof:
    found = [rows[case] for case in asked]
    for row in found:
        if not row["passed"]:
            failed = [other for other in rows.values() if not other["passed"]]
            words = "; ".join(f"{other['op']}: {other['reason']}" for other in failed)
            warn(
                f"{backend} failed its self-check on {row['gpu']} in {row['dtype']}, the next backend runs "
                f"there ({words}). To see it: {row['command']}; to check anew: {AHEAD} --again"
            )
            return Proof(
                False, f"its self-check failed here, {row['date']}: {row['reason']}; {row['command']}"
            )
    first, cases = min(found, key=lambda row: row["date"]), sum(row["cases"] for row in found)
    return Proof(True, f"self-check passed here, {first['date']}, {cases} cases, source {first['source']}")


def check_again(groups: list[Group], dtype: torch.dtype, device: torch.device) -> None:
    """New verdicts in place of what is kept on `groups`."""
    with _lock, alone(path := file()):
        forget()
        keep(path, check(groups, dtype, device))


def _environment(device: torch.device) -> dict[str, str]:
    """Of a process whose first GPU is `device`, and which does not check itself."""
    own = {**os.environ, "CUMO_SELF_CHECK": "0"}
    own.pop("CUMO_BACKEND", None)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        visible = own.get("CUDA_VISIBLE_DEVICES", "").strip()
        names = visible.split(",") if visible else []
        own["CUDA_VISIBLE_DEVICES"] = names[index].strip() if index < len(names) else str(index)
    return own


def check(groups: list[Group], dtype: torch.dtype, device: torch.device) -> list[dict]:
    """Rows for those of `groups` that come to a verdict now; for the others `_why`."""
    name = str(dtype).removeprefix("torch.")
    gpu = identity(groups[0][0], device)["gpu"]
    backends = " and ".join(dict(groups))
    _say(
        f"checking {backends} on {gpu} in {name}, once for this machine: it takes seconds "
        "(CUMO_SELF_CHECK=0 turns it off)"
    )
    if "cuda" in dict(groups) and (extension.JIT or extension.EMULATE):
        extension.load()  # compiling takes minutes, which are no case's
    words = ["self-check", "--only", json.dumps(groups), "--dtype", SHORT[name], "--device", device.type]
    words += ["--seconds", str(SECONDS), "--case-seconds", str(CASE_SECONDS)]
    if device.type == "cuda":
        words += ["--memory", str(torch.cuda.mem_get_info(device)[0])]
    answer, error = _ask(words, _environment(device))
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    found = {(row["backend"], row["op"]): row for row in answer}
    rows = []
    for backend, op in groups:
        row = found.get((backend, op), {"why": error})
        if "why" in row:
            _why[backend, op, name] = row["why"]
        else:
            rows.append({**identity(backend, device), "dtype": name, "date": date, **row})
    return rows


def _ask(words: list[str], environment: dict[str, str]) -> tuple[list[dict], str]:
    """-> the rows that a process of its own prints, and how it ended if it printed none."""
    process = subprocess.Popen(
        [*COMMAND, *words], env=environment, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=SECONDS + CASE_SECONDS)
        return json.loads(out.strip().splitlines()[-1]), ""
    except subprocess.TimeoutExpired:
        return [], f"it did not end within {SECONDS + CASE_SECONDS:.0f} s"
    except (ValueError, IndexError):
        last = errors.strip().splitlines()[-1:] or ["without a word"]
        return [], f"its process ended with {process.returncode}: {last[0]}"
    finally:
        if process.poll() is None:  # time is over, or the caller was interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
