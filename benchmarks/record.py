"""Stores timings: one row per timing, appended to <results>/<machine>/<op>.csv.

Pictures and the report use only these files. Results of one's own machine are in `LOCAL`, which git ignores,
those that are committed in `RESULTS`.
"""

import csv
import io
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import torch

from cumo_kernels import dispatch
from cumo_kernels.files import write_whole
from cumo_kernels.tiles import hardware
from cumo_kernels.verification import verified

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS = tuple(backend.name for backend in dispatch.BACKENDS)
LOCAL = ROOT / "build" / "benchmarks" / "results"


@dataclass
class Row:
    """One variant of one case in one mode. Times in milliseconds; empty if not measured."""

    run: str  # rows of one run were timed alternately, in the same machine state
    op: str
    variant: str  # `ours`, a peer, or "dense": one expert, no routing, the same FLOPs
    mode: str  # forward (no gradient) | backward | both
    shape: str
    tokens: int
    sizes: str  # H I O E K
    pattern: str
    dtype: str
    timer: str  # eager | graph (CUDA graph replay) | cpu (processor time, 1 thread) | wall | host (GPU idle)
    cache: str  # cold: the L2 was overwritten before every run | warm
    rounds: int
    ms_p20: float
    ms_p50: float
    ms_p80: float
    tflops: float | None  # the formula's FLOPs, not what the variant executes
    gb_per_s: float | None
    floor_ms: float | None  # the data sheet's roofline: the larger of FLOPs / peak and bytes / bandwidth
    share_of_floor: float | None  # floor_ms / ms_p50; the report calls it the share of the roofline
    ratio_to_dense: float | None  # dense ms / ms, at equal FLOPs, in the same run
    saved_bytes: int | None  # saved for backward, without inputs and weights
    peak_bytes: int | None  # above what was allocated before
    error: float | None  # largest error of an output, in units of torch's own; from the gate
    gradient_error: float | None
    gate: str  # "" if the gate ran at this size, else its size
    machine: str
    device: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str


@dataclass(frozen=True)
class Gap:
    """A requested timing that was not made, and why."""

    op: str
    variant: str  # or "all"
    mode: str  # "backward" or "all"; any mode if timing failed in it; as_graph(mode) if capture failed
    shape: str
    tokens: int
    sizes: str  # H I O E K
    pattern: str
    dtype: str
    reason: str
    machine: str
    run: str


def ours(backend: str) -> str:
    """The variant "cumo/<backend>"; "cumo/<backend>+pdl" if CUMO_PDL=1 changes its launches."""
    return f"cumo/{backend}" + ("+pdl" if os.environ.get("CUMO_PDL") == "1" else "")


FAULTS = ("the gate refuses it", "it cannot run", "it hung", "it broke the device")  # their prefixes


def is_ours(variant: str) -> bool:
    """Whether a variant runs our code: "cumo/triton", or "triton (int4)" beside other implementations."""
    return variant.startswith("cumo/") or re.split(r"[ +]", variant)[0] in OURS


def is_fault(gap: Gap) -> bool:
    """Whether the variant is wrong or broken, not just absent or without a mode."""
    return gap.reason.startswith(FAULTS) or " broke the device: " in gap.reason


def reasons(gaps: Iterable[Gap]) -> list[str]:
    """A line for each reason why something was not timed: how often, and for which variants."""
    found: dict[str, list[Gap]] = {}
    for gap in gaps:
        found.setdefault(gap.reason, []).append(gap)
    names = lambda group: dict.fromkeys(
        gap.variant + ("" if gap.mode == "all" else f" {gap.mode}") for gap in group
    )
    return [
        f"NOT TIMED ({len(group)}x): {reason} ({', '.join(names(group))})" for reason, group in found.items()
    ]


GAPS = "not_timed.csv"
NO_TIME = "no time was left for it"


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else "unknown CPU"


@cache
def commit() -> str:
    """Short hash, followed by "+" if tracked files differ; "unknown" outside a checkout."""
    head = verified.first_line("git", "rev-parse", "--short=10", "HEAD")
    code = ("*.py", "*.json", "csrc")  # documentation does not change timings
    changed = verified.first_line("git", "status", "--porcelain", "-uno", "--", *code)
    return f"{head}{'+' if changed else ''}" if head else os.environ.get("CUMO_COMMIT") or "unknown"


@cache
def machine(device: str) -> dict[str, str]:
    """The columns machine, device and driver of rows measured on `device`, "cpu" or "cuda"."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        row = hardware.gpu_of(torch.device("cuda"))
        return {"machine": row.name, "device": name, "driver": verified.driver()}
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


def _append(path: Path, added: Iterable[Row | Gap]) -> None:
    """Write atomically; refuse a file with other columns."""
    added = list(added)
    columns = [field.name for field in fields(added[0])]
    old = path.read_text() if path.exists() else ",".join(columns) + "\n"
    if old.partition("\n")[0].split(",") != columns:
        got = old.partition("\n")[0]
        raise ValueError(f"{path} must have the columns {','.join(columns)}, got {got}")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(_text, asdict(row).values()) for row in added)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, old + text.getvalue())


def append(rows: Iterable[Row], results: Path = RESULTS) -> list[Path]:
    """Add `rows` to the files of their machines and ops.

    Raises:
        ValueError: a file there has other columns.
    """
    files: dict[Path, list[Row]] = {}
    for row in rows:
        files.setdefault(results / row.machine / f"{row.op}.csv", []).append(row)
    for path, added in files.items():
        _append(path, added)
    return list(files)


def append_gaps(gaps: Iterable[Gap], results: Path = RESULTS) -> None:
    """Add `gaps` to the file of their machine."""
    gaps = list(gaps)
    if gaps:
        _append(results / gaps[0].machine / GAPS, gaps)


def _lines(path: Path) -> Iterable[dict[str, str]]:
    return csv.DictReader(path.read_text().splitlines())


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

    paths = (path for path in sorted(results.glob("*/*.csv")) if path.name != GAPS)
    return [Row(**{k: value(k, text) for k, text in line.items()}) for path in paths for line in _lines(path)]


def read_gaps(results: Path = RESULTS) -> list[Gap]:
    """The gaps of each machine, the latest for each case."""
    lines = [line for path in sorted(results.glob(f"*/{GAPS}")) for line in _lines(path)]
    found = [Gap(**{**line, "tokens": int(line["tokens"])}) for line in lines]
    return list({(g.machine, g.variant, g.mode, *case_of(g)): g for g in found}.values())


def runs(results: Path = RESULTS) -> set[str]:
    """The ids of all runs that left a row or a gap."""
    return {row.run for row in read(results)} | {gap.run for gap in read_gaps(results)}


def case_of(line: Row | Gap) -> tuple[str | int, ...]:
    """The case of a row or gap, independent of variant and mode."""
    return line.op, line.shape, line.tokens, line.sizes, line.pattern, line.dtype


def as_graph(mode: str) -> str:
    """The name of a mode's CUDA graph."""
    return f"{mode}, CUDA graph"


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows for the same measurement on the same machine, the last one."""
    return list({(r.machine, r.variant, r.mode, r.timer, *case_of(r)): r for r in rows}.values())
