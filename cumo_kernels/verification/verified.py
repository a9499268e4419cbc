"""verified.json: which backends passed verify on which GPU, so that they may run there.

    {gpu: [{"backend": "triton", "op": "expert_mlp", "dtype": "bfloat16", "cases": 36, "date": "2026-11-28",
            "torch": "2.11.0+cu130", "triton": "3.6.0", "driver": ..., "code": "", "commit": ...,
            "source": hash, "failed": 0}]}

gpu is a name of hardware.py, op one of a case (`COVERS` lists the calls that it stands for), code the
architecture whose machine code of csrc/ ran, failed the number of failed cases. `python -m cumo_kernels
verify --record` writes the file; do not edit it by hand. An entry is valid while the files that decide what
the backend computes have the same hash, with the same major.minor of torch and, for Triton, of triton. A GPU
without a list of its own uses that of the GPU whose tiles it uses (`tiles_of`: same multiprocessors, same
machine code). Where no entry is valid, a self-check decides (self_check.py).

Tile sizes, configs/*.json, are not in the hash. They choose among instances of the same code, as every shape
does: verify cannot run each instance anyway, and `tune` would invalidate the entries of what it made faster.

An installation without csrc/ (a wheel) cannot compute the hash that `_C` was built from. verified.json was
packed in the same build, so there an entry is valid if torch and code agree.
"""

import contextlib
import json
import os
import subprocess
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from cumo_kernels import extension, versions
from cumo_kernels.tiles import measured
from cumo_kernels.tiles.hardware import GPUS, Gpu, gpu_of
from cumo_kernels.versions import series

ROOT = Path(__file__).resolve().parents[2]
PATH = Path(__file__).with_name("verified.json")
COVERS = {  # op of a case -> the calls in dispatch.OPS that it makes
    "route": ("route", "route_backward", "sort_by_expert"),
    "scored_route": ("scored_route", "scored_route_backward"),
    "permute": ("permute", "sort_by_expert"),
    "combine": ("combine", "combine_backward"),
    "grouped_gemm": ("grouped_gemm", "grouped_gemm_weight_grad"),
    "activate": ("activate", "activate_backward"),
    "expert_mlp": ("expert_mlp", "expert_mlp_backward"),
    "packed_grouped_gemm": ("packed_grouped_gemm",),
    "adapted_expert_mlp": ("adapted_expert_mlp", "adapted_expert_mlp_backward"),
}
LACKS = {
    "cuda": ("packed_grouped_gemm", "adapted_expert_mlp"),
}  # backend -> ops of cases that it refuses
SOURCES = {  # backend -> the files that decide what it computes
    "triton": (
        "cumo_kernels/backends/triton/*.py",
        "cumo_kernels/tiles/tuning.py",
        "cumo_kernels/activations.py",
        "cumo_kernels/tiles/hardware.py",
        "cumo_kernels/packing/formats.py",
        "cumo_kernels/ops/*.py",
    ),
    "cuda": (
        "csrc/*",
        "cumo_kernels/backends/cuda/*.py",
        "cumo_kernels/activations.py",
        "cumo_kernels/ops/*.py",
    ),
}
KEYS = {
    "backend", "op", "dtype", "cases", "failed", "date", "torch", "triton", "driver", "commit", "code",
    "source",
}  # fmt: skip
OTHER_CODE = (
    "TRITON_INTERPRET",
    "CUMO_EMULATE",
    "CUMO_BATCH_INVARIANT",
    "CUMO_PDL",
    "TRITON_FORCE_DISABLE_FP_FUSION",
)  # not the default code
Group = tuple[str, str, str]  # backend, op of a case, dtype ("bfloat16")


class Proof(NamedTuple):
    """Whether a backend is verified; None if unknown."""

    passed: bool | None
    words: str
    is_final: bool = True  # for the life of this process


def has(backend: str, op: str) -> bool:
    """Whether `backend` has kernels for the cases of `op`."""
    return op not in LACKS.get(backend, ())


def load(path: Path = PATH) -> dict[str, list[dict]]:
    """Read the file; if that fails, warn and treat it as empty."""
    try:
        table = json.loads(path.read_text())
        for rows in table.values():
            for row in rows:
                if lacking := KEYS - row.keys():
                    raise ValueError(f"a row must have {sorted(KEYS)}, it lacks {sorted(lacking)}")
        return table
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        words = f"{type(error).__name__}: {error}"
        warnings.warn(f"{path} cannot be read, so no backend counts as verified ({words})", stacklevel=2)
        return {}


def _group(row: dict) -> Group:
    return row["backend"], row["op"], row["dtype"]


TABLE = load()


@cache
def source_of(backend: str, root: Path = ROOT) -> str | None:
    """Hash of the files of `SOURCES` (names and bytes); None if csrc/ is needed but missing."""
    if backend == "cuda" and not (root / "csrc").is_dir():
        return None
    found = (path for pattern in SOURCES[backend] for path in root.glob(pattern))
    options = [*extension.CXX_FLAGS, *extension.nvcc_flags("9.0a")] if backend == "cuda" else []
    return extension.hash_of_files(found, root, " ".join(options))


@cache
def triton_version() -> str:
    return versions.installed("triton") or "none"


def _code(backend: str, device: torch.device | str) -> str:
    return extension.code_for(device) if backend == "cuda" else ""


def other_code() -> list[str]:
    """The active switches that choose code other than the verified code, as "NAME=value"."""
    return [f"{name}={os.environ[name]}" for name in OTHER_CODE if os.environ.get(name, "") not in ("", "0")]


def proof(backend: str, op: str, dtype: torch.dtype, device: torch.device) -> Proof:
    """The verdict of verified.json on `backend` for the call `op` of dispatch.OPS on `device`."""
    if device.type == "cuda" and not torch.cuda.is_available():  # fake tensors of a compiler
        return Proof(None, "not verified: there is no CUDA device here to identify")
    if backend == "cuda" and (stale := extension.outdated()) is not None:
        return Proof(None, f"not verified: {stale}")
    if others := other_code():
        return Proof(None, f"not verified under {others[0]}")
    return _proof(backend, op, str(dtype).removeprefix("torch."), gpu_of(device), _code(backend, device))


def _proof(backend: str, op: str, dtype: str, gpu: Gpu, code: str) -> Proof:
    own = gpu.name in TABLE
    where = gpu.name if own or gpu.tiles_of is None else gpu.tiles_of
    spoken = where if own or where == gpu.name else f"{where}, with the multiprocessors of {gpu.name}"
    rows = {_group(row): row for row in TABLE.get(where, ())}
    asked = [
        row for case, calls in COVERS.items() if op in calls for row in [rows.get((backend, case, dtype))]
    ]
    for row in filter(None, asked):
        known = f"{'failed verify' if row['failed'] else 'verified'} on {spoken}, {row['date']}"
        if source_of(backend) not in (None, row["source"]):
            return Proof(None, f"{known}, but its source has changed since")
        if row["code"] != code:
            return Proof(None, f"{known}, compiled for {row['code']}, but this is for {code}")
        for name, running in (("torch", torch.__version__), ("triton", triton_version())):
            if (name == "torch" or backend == "triton") and series(row[name]) != series(running):
                return Proof(None, f"{known}, with {name} {series(row[name])}, but this is {running}")
        if row["failed"]:
            return Proof(False, f"{known}: {row['failed']} of {row['cases']} cases of {row['op']}")
    if None in asked or not asked:
        return Proof(None, f"not verified on {gpu.name} in {dtype}")
    first = min(asked, key=lambda row: row["date"])
    agreed = f"torch {series(first['torch'])}"
    agreed += f", triton {series(first['triton'])}" if backend == "triton" else ""
    cases = sum(row["cases"] for row in asked)
    return Proof(True, f"verified on {spoken}, {first['date']}, {agreed}, {cases} cases")


def check_known(gpu: Gpu) -> None:
    """Raise a ValueError if `gpu` has no row in hardware.py: another card might have the same name."""
    names = [known.name for known in GPUS]
    if gpu.name not in names:
        raise ValueError(f"gpu must be one of {names} to be recorded, got {gpu.name!r}")


def record(
    passed: Mapping[Group, int], failed: Mapping[Group, tuple[int, int]], gpu: Gpu, path: Path = PATH
) -> tuple[int, int]:
    """Write what passed and what failed into the file, all or nothing.

    Args:
        gpu: the GPU on which the cases ran.
        passed: group -> number of its cases.
        failed: group -> number of failed cases, and of all that ran.

    Returns:
        Number of entries written for what passed, and for what failed.
    """
    check_known(gpu)
    table = load(path) if path.exists() else {}
    kept = [row for row in table.get(gpu.name, []) if _group(row) not in failed.keys() | passed.keys()]
    common = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "torch": torch.__version__,
        "triton": triton_version(),
        "driver": driver(),
        "commit": first_line("git", "rev-parse", "--short=10", "HEAD") or os.environ.get("CUMO_COMMIT", ""),
    }
    numbers = {group: (0, cases) for group, cases in passed.items()} | dict(failed)
    new = [
        {"backend": backend, "op": op, "dtype": dtype, "cases": cases, "failed": bad, **common}
        | {"code": _code(backend, "cuda"), "source": source_of(backend)}
        for (backend, op, dtype), (bad, cases) in numbers.items()
    ]
    table[gpu.name] = sorted([*kept, *new], key=_group)
    path.parent.mkdir(parents=True, exist_ok=True)
    measured.write(table, path)
    return len(numbers) - len(failed), len(failed)


@cache
def driver() -> str:
    """Version of NVIDIA's driver; "" if unknown."""
    with contextlib.suppress(OSError):
        for word in Path("/proc/driver/nvidia/version").read_text().split():
            if word[0].isdigit() and "." in word:
                return word
    return first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def first_line(*command: str) -> str:
    """First output line of `command`, run in this tree; "" if it is missing, fails or takes over 20 s."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""
