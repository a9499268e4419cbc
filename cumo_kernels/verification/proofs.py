"""Decides which backend is trusted on this GPU: by verified.json, else by a self-check on this machine.

If verified.json has no entry for a GPU, the first eager call in a dtype runs the self-check of the backends
and ops that are likely to be needed (self_check.py), in a separate process with a time limit. So a wrong
value, an exception, a hang, an abort or a lost device only disables the backend. A verdict (verdict_file.py)
is valid for the same GPU, driver, torch, Triton, machine code and sources. One process of a machine checks,
the others wait for it. While a graph is captured or compiled nothing is checked, and a backend without a
verdict is not used.

`CUMO_SELF_CHECK=0`: no checks; existing verdicts are still used.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from datetime import UTC, datetime

import torch

from cumo_kernels import extension
from cumo_kernels.tiles.hardware import gpu_of
from cumo_kernels.verification import verdict_file, verified
from cumo_kernels.verification.verified import COVERS, Proof

SECONDS = 240.0  # the longest that one call waits for checks
CASE_SECONDS = 60.0  # limit of one case, including its compilation
HEAD_START = 20.0  # time in which local rank 0 may start before the other ranks of its node
DAY, MINUTE = 86_400, 60
SOON = 10 * MINUTE  # time until an inconclusive check is repeated
AHEAD = "python -m cumo_kernels self-check"
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
ELSEWHERE = (  # variables that a check must not inherit: they choose backends, hide races or skip captures
    "CUMO_BACKEND", "CUDA_LAUNCH_BLOCKING", "PYTORCH_NO_CUDA_MEMORY_CACHING", "PYTHONWARNINGS",
)  # fmt: skip
Group = tuple[str, str]  # backend, op of a case

_lock = threading.RLock()
_settled: dict[tuple, tuple[Proof, ...]] = {}
_here: list[dict] = []  # rows that could not be saved
_said: set[str] = set()


def command() -> list[str]:
    """The command line of this package's `python -m cumo_kernels`, independent of the current folder."""
    code = (
        "import sys\n"
        f"root = {str(verified.ROOT)!r}\n"
        "root in sys.path or sys.path.insert(0, root)\n"
        f"sys.path += [path for path in {[path for path in sys.path if path]!r} if path not in sys.path]\n"
        "from cumo_kernels import __main__\n"
        "raise SystemExit(__main__.main())"
    )
    # a warning must not count as a failure
    flags = [flag for flag in subprocess._args_from_interpreter_flags() if not flag.startswith("-W")]
    return [sys.executable, *flags, "-P", "-c", code]


def forget() -> None:
    """Clear this process's caches: the next call reads the file."""
    for known in (_settled, _here, _said):
        known.clear()


def turned_off() -> bool:
    """Whether self-checks are disabled.

    Raises:
        ValueError: CUMO_SELF_CHECK is neither 0 nor 1.
    """
    asked = os.environ.get("CUMO_SELF_CHECK", "").strip() or "1"
    if asked not in ("0", "1"):
        raise ValueError(f"CUMO_SELF_CHECK must be 0 or 1, got {asked!r}")
    return asked == "0"


def identity(backend: str, device: torch.device) -> dict:
    """Everything that a verdict depends on.

    code: the architecture whose machine code runs. switches: environment variables that choose other code.
    source: the hash of the files that decide what the backend computes. built: the hash of the csrc/ that
    `_C` was built from.
    """
    gpu, built = gpu_of(device), ""
    if backend == "cuda" and not (extension.EMULATE or extension.JIT):
        built = getattr(extension.load(), "source", "unknown")
    return {
        "gpu": gpu.name,
        "capability": gpu.capability,
        "sms": gpu.sms,
        "driver": verified.driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": verified.triton_version(),
        "code": extension.code_for(device) if backend == "cuda" else "",
        "switches": " ".join(verified.other_code()),
        "source": verified.source_of(backend) or "",
        "built": built,
    }


def _kept(backend: str, dtype: str, device: torch.device) -> dict[str, dict]:
    """op of a case -> the saved verdict that is valid here and now."""
    mine = {**identity(backend, device), "backend": backend, "dtype": dtype}.items()
    return {row["op"]: row for row in [*verdict_file.load(), *_here] if mine <= row.items()}


def _keep(new: list[dict]) -> None:
    if verdict_file.keep(new) is None:
        _here.extend(new)
        _say("verdicts of the self-check cannot be saved: the next process checks again")


def _say(line: str) -> None:
    """Print a line once per process."""
    if line not in _said:
        _said.add(line)
        print(f"cumo_kernels: {line}", file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Issue a warning once per process."""
    if line not in _said:
        _said.add(line)
        warnings.warn(line, stacklevel=2)


def proofs(
    backends: tuple[str, ...], op: str, dtype: torch.dtype, device: torch.device, may_check: bool
) -> tuple[Proof, ...]:
    """For each of `backends`: whether it is trusted with `op` (of dispatch.OPS) on `device`, and why.

    `may_check`: False while a graph is compiled or captured, and for queries without a call.
    """
    key = backends, op, dtype, device if device.type == "cuda" else gpu_of(device)
    if (known := _settled.get(key)) is not None:
        return known
    warnings_due: list[str] = []
    with _lock:
        found = {name: verified.proof(name, op, dtype, device) for name in backends}
        unknown = [name for name in backends if found[name].passed is None]
        if unknown and (device.type != "cuda" or torch.cuda.is_available()):
            off = turned_off()
            try:
                own = _own(unknown, op, dtype, device, may_check, off, warnings_due)
            except Exception as error:  # a machine that cannot run the check must not fail the call
                words = f"its self-check could not run, {type(error).__name__}: {error}"
                own = dict.fromkeys(unknown, Proof(None, words))
                warnings_due.append(f"{' and '.join(unknown)} cannot be checked on this GPU: {words}")
            for name, verdict in own.items():
                shipped = f"{found[name].words}; " if verdict.passed is None else ""
                found[name] = verdict._replace(words=shipped + verdict.words)
        answer = tuple(found[name] for name in backends)
        if all(verdict.is_final for verdict in answer):
            _settled[key] = answer
    for line in warnings_due:
        warn(line)
    return answer


def _own(
    backends: list[str],
    op: str,
    dtype: torch.dtype,
    device: torch.device,
    may_check: bool,
    off: bool,
    warnings_due: list[str],
) -> dict[str, Proof]:
    """This machine's own verdict on each backend, or why there is none."""
    name = str(dtype).removeprefix("torch.")
    asked = [case for case, calls in COVERS.items() if op in calls]
    # a layer's other ops follow; only sorting is called in the dtype of the given weights
    more = list(COVERS) if device.type == "cuda" and op != "sort_by_expert" else asked
    kept = lambda: {backend: _kept(backend, name, device) for backend in backends}
    missing = lambda rows, cases: [
        (b, case) for b in backends for case in cases if case not in rows[b] and verified.has(b, case)
    ]
    rows = kept()
    if missing(rows, asked) and may_check and not off:
        with verdict_file.alone(HEAD_START, SECONDS + CASE_SECONDS):
            if groups := missing(kept(), more):
                _keep(check(groups, dtype, device))
        rows = kept()
    found: dict[str, Proof] = {}
    for backend in backends:
        if all(case in rows[backend] for case in asked):
            found[backend] = _verdict(backend, asked, rows[backend], warnings_due)
        elif off:
            found[backend] = Proof(None, "CUMO_SELF_CHECK=0 disables its self-check")
        else:
            words = f"its self-check has not run yet: the first eager call runs it, or {AHEAD}"
            found[backend] = Proof(None, words, is_final=False)
    return found


def _verdict(backend: str, asked: list[str], rows: dict[str, dict], warnings_due: list[str]) -> Proof:
    found = [rows[case] for case in asked]
    for passed, words in ((False, "failed"), (None, "was inconclusive")):
        for row in found:
            if row["passed"] is passed:
                alike = [other for other in rows.values() if other["passed"] is passed]
                reasons = "; ".join(f"{other['op']}: {other['reason']}" for other in alike)
                see = f". To reproduce: {row['command']}" if row["command"] else ""
                warnings_due.append(
                    f"{backend}'s self-check on {row['gpu']} in {row['dtype']} {words}, so the next backend "
                    f"runs there ({reasons}){see}. To check again: {AHEAD} --again"
                )
                why = "; ".join(filter(None, (row["reason"], row["command"])))
                return Proof(passed, f"its self-check {words} here, {row['date']}: {why}")
    first, cases = min(found, key=lambda row: row["date"]), sum(row["cases"] for row in found)
    return Proof(True, f"self-check passed here, {first['date']}, {cases} cases, source {first['source']}")


def check_again(groups: list[Group], dtype: torch.dtype, device: torch.device) -> None:
    """Check `groups` again and replace their saved verdicts."""
    with _lock, verdict_file.alone(HEAD_START, SECONDS + CASE_SECONDS):
        forget()
        _keep(check(groups, dtype, device))


def _environment(device: torch.device) -> dict[str, str]:
    """The environment of a process whose first GPU is `device` and which runs no self-check."""
    own = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    own["CUMO_SELF_CHECK"] = "0"
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        visible = own.get("CUDA_VISIBLE_DEVICES", "").strip()
        names = visible.split(",") if visible else []
        own["CUDA_VISIBLE_DEVICES"] = names[index].strip() if index < len(names) else str(index)
    return own


def check(groups: list[Group], dtype: torch.dtype, device: torch.device) -> list[dict]:
    """A row for each of `groups`, after a check in a separate process."""
    name = str(dtype).removeprefix("torch.")
    gpu = identity(groups[0][0], device)["gpu"]
    backends = " and ".join(dict(groups))
    _say(
        f"checking {backends} on {gpu} in {name}, once for this machine; takes seconds "
        "(CUMO_SELF_CHECK=0 disables it)"
    )
    if "cuda" in dict(groups) and (extension.JIT or extension.EMULATE):
        extension.load()  # compiling takes minutes, which must not count for a case
    words = ["self-check", "--only", json.dumps(groups), "--dtype", SHORT[name], "--device", device.type]
    words += ["--seconds", str(SECONDS), "--case-seconds", str(CASE_SECONDS)]
    if device.type == "cuda":
        words += ["--memory", str(torch.cuda.mem_get_info(device)[0])]
    answer, error = _ask(words, _environment(device))
    found = {(row["backend"], row["op"]): row for row in answer}
    rows = []
    for backend, op in groups:
        nothing = {"passed": None, "cases": 0, "reason": error, "command": "", "kept": SOON}
        row = {"backend": backend, "op": op, "dtype": name, **nothing} | found.get((backend, op), {})
        seconds = row.pop("kept")
        row |= {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "until": int(time.time() + seconds) if seconds else 0,
        }
        rows.append({**identity(backend, device), **row})
    return rows


def _ask(words: list[str], environment: dict[str, str]) -> tuple[list[dict], str]:
    """-> the rows printed by a separate process, and how it ended if it printed none.

    The process and its children end with this call and with this process, since its standard input is closed.
    """
    process = subprocess.Popen(
        [*command(), *words], env=environment, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    texts: dict[str, str] = {}
    read = lambda name: texts.update({name: getattr(process, name).read()})
    readers = [threading.Thread(target=read, args=[name], daemon=True) for name in ("stdout", "stderr")]
    try:
        for reader in readers:
            reader.start()
        try:
            process.wait(timeout=SECONDS + CASE_SECONDS)
        except subprocess.TimeoutExpired:
            return [], f"it did not end within {SECONDS + CASE_SECONDS:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for reader in readers:
            reader.join(timeout=5)
        process.stdin.close()
    try:
        return json.loads(texts["stdout"].strip().splitlines()[-1]), ""
    except (KeyError, ValueError, IndexError):
        last = texts.get("stderr", "").strip().splitlines()[-1:] or ["no output"]
        return [], f"its process ended with {process.returncode}: {last[0]}"
