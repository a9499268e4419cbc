"""One timing is one row; rows are appended to benchmarks/results/<machine>/<op>.csv.

Pictures and reports read these files and nothing else.
"""

import csv
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import torch

from cumo_kernels import hardware

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Row:
    """One variant of one case in one mode. Times in milliseconds; empty where nothing was measured."""

    run: str  # rows of one run were timed interleaved, on the same machine state
    op: str
    variant: str  # "cumo/<backend>", a peer, or "dense": one expert, no routing, the same FLOPs
    mode: str  # forward (no gradient) | backward | both
    shape: str
    tokens: int
    sizes: str  # H I O E K
    pattern: str
    dtype: str
    timer: str  # eager | graph (CUDA graph replay) | cpu (processor time, one thread) | wall
    cache: str  # cold: the L2 was overwritten before every run | warm
    rounds: int
    ms_p20: float
    ms_p50: float
    ms_p80: float
    tflops: float | None  # the formula's FLOPs, not what the variant executes
    gb_per_s: float | None
    floor_ms: float | None  # the larger of FLOPs / peak and bytes / bandwidth of the data sheet
    share_of_floor: float | None
    ratio_to_dense: float | None  # dense ms / ms, at equal FLOPs, in the same run
    saved_bytes: int | None  # kept for backward, inputs and weights not counted
    peak_bytes: int | None  # above what was allocated before
    error: float | None  # worst output, in units of torch's own error; the gate measured it
    gradient_error: float | None
    gate: str  # "" when the gate ran at this very size, else the size it ran at
    machine: str
    device: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str


COLUMNS = tuple(field.name for field in fields(Row))


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else "unknown CPU"


@cache
def commit() -> str:
    """Short hash, "+" behind it when tracked files differ; "unknown" outside a checkout."""
    head = _first_line(["git", "rev-parse", "--short=10", "HEAD"])
    changed = _first_line(
        ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]
    )
    return f"{head}{'+' if changed else ''}" if head else os.environ.get("CUMO_COMMIT", "unknown")


@cache
def machine(device: str) -> dict[str, str]:
    """The columns machine, device and driver of rows measured on `device`, "cpu" or "cuda"."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        row = hardware.gpu_of(torch.device("cuda"))
        driver = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        return {"machine": row.name, "device": name, "driver": driver}
    name = _cpu_name()
    threads = torch.get_num_threads()
    words = re.sub(r"\((r|tm)\)|cpu|processor|@.*", " ", name.lower())
    slug = "_".join(re.findall(r"[a-z0-9]+", words)) or "unknown"
    return {
        "machine": f"cpu_{slug}_{threads}t",
        "device": f"{name}, {threads} of {os.cpu_count()} threads",
        "driver": "",
    }


@cache
def versions() -> dict[str, str]:
    try:
        import triton
    except ModuleNotFoundError:
        return {"torch": torch.__version__, "triton": ""}
    return {"torch": torch.__version__, "triton": triton.__version__}


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def append(rows: Iterable[Row], results: Path = RESULTS) -> list[Path]:
    """Add `rows` to the files of their machines and ops; each file changes in one move.

    Raises:
        ValueError: a file there has other columns.
    """
    files: dict[Path, list[Row]] = {}
    for row in rows:
        files.setdefault(results / row.machine / f"{row.op}.csv", []).append(row)
    for path, added in files.items():
        old = path.read_text() if path.exists() else ",".join(COLUMNS) + "\n"
        if tuple(old.partition("\n")[0].split(",")) != COLUMNS:
            raise ValueError(
                f"{path} must have the columns {', '.join(COLUMNS)}, got {old.partition(chr(10))[0]}"
            )
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([_text(value) for value in asdict(row).values()] for row in added)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            file.write(old + text.getvalue())
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    return list(files)


def read(results: Path = RESULTS) -> list[Row]:
    """Every row of every file, in the order of files and lines."""
    kinds = {field.name: field.type for field in fields(Row)}

    def value(name: str, text: str) -> object:
        kind = kinds[name]
        if kind is str:
            return text
        if text == "":
            return None
        return int(text) if kind in (int, int | None) else float(text)

    return [
        Row(**{name: value(name, text) for name, text in line.items()})
        for path in sorted(results.glob("*/*.csv"))
        for line in csv.DictReader(path.read_text().splitlines())
        if path.read_text().startswith("run,op,")
    ]


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows for the same measurement on the same machine, the last one."""
    key = lambda r: (
        r.machine,
        r.op,
        r.variant,
        r.mode,
        r.shape,
        r.tokens,
        r.sizes,
        r.pattern,
        r.dtype,
        r.timer,
    )
    return list({key(row): row for row in rows}.values())
