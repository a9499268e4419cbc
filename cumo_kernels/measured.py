"""Which backend was faster where: the one table, measured.json, that the automatic choice looks at.

    {gpu: [{"op": ..., "mode": "both", "dtype": "bfloat16", "shape": [rows, columns], "ms": {backend: ...}}]}

gpu is a name of hardware.py, or "cpu" for all of them; shape that of the op's first tensor, mode "forward"
without gradients or "both" with backward. `python -m benchmarks.choose` writes it from timings behind a green
check, nobody by hand. On a GPU the entry of the nearest shape counts; without entries, and in graphs that are
being compiled, the first backend of dispatch.BACKENDS that can run wins. On CPUs the mean over all shapes
counts, in compiled graphs too.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from cumo_kernels.hardware import INTERPRETER, gpu_of
from cumo_kernels.tracing import constant
from cumo_kernels.tuning import BATCH_INVARIANT

PATH = Path(__file__).with_name("measured.json")
TABLE: dict[str, list[dict]] = json.loads(PATH.read_text())
CPU = "cpu"
ALIKE = {"float16": "bfloat16"}  # the same instructions and the same bytes


def machine_of(device: torch.device) -> str:
    """Whose entries count for tensors on `device`."""
    gpu = gpu_of(device)
    return CPU if gpu is INTERPRETER else gpu.name


def fastest(op: str, x: torch.Tensor, among: Sequence[str], with_backward: bool) -> tuple[str, str] | None:
    """The backend that took least, as the head of this file says, and the reason; None without such data.

    `with_backward` compares forward and backward together: backward runs where forward ran.
    """
    mode = "both" if with_backward else "forward"
    if x.device.type == "cpu":
        found = _on_cpus(op, mode, x.dtype, tuple(among))
        if found is not None:
            return found
    # a row's result must not depend on how many come with it, so neither may its backend
    if not TABLE or x.ndim == 0 or torch.compiler.is_compiling() or BATCH_INVARIANT:
        return None
    return _fastest(machine_of(x.device), op, mode, x.dtype, tuple(x.shape), tuple(among))


@constant
def _on_cpus(op: str, mode: str, dtype: torch.dtype, among: tuple[str, ...]) -> tuple[str, str] | None:
    """As `fastest`, over all shapes that were timed: a graph whose sizes are symbols gets the same answer."""
    if machine_of(torch.device("cpu")) != CPU:  # CPU tensors stand for a GPU's
        return None
    return _mean(op, mode, dtype, among)


@lru_cache(maxsize=4096)
def _mean(op: str, mode: str, dtype: torch.dtype, among: tuple[str, ...]) -> tuple[str, str] | None:
    rows = _rows(CPU, op, mode, dtype, among)
    if not rows:
        return None
    # of each backend the geometric mean
    times = {name: math.exp(sum(math.log(row["ms"][name]) for row in rows) / len(rows)) for name in among}
    return min(times, key=times.get), f"measured on CPUs, {_spoken(dtype)}{_said(mode)}: {_list(times)}"


def _spoken(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _said(mode: str) -> str:
    return " with backward" if mode == "both" else ""


def _list(times: dict[str, float]) -> str:
    return ", ".join(f"{name} {ms:.4g} ms" for name, ms in times.items())


def _rows(machine: str, op: str, mode: str, dtype: torch.dtype, among: Iterable[str]) -> list[dict]:
    """Entries in which all of `among` were timed; torch may be missing in older ones of GPUs."""
    kind, must = _spoken(dtype), [name for name in among if name != "torch" or machine == CPU]
    return [
        row
        for row in TABLE.get(machine, ())
        if (row["op"], row["mode"], ALIKE.get(row["dtype"], row["dtype"]))
        == (op, mode, ALIKE.get(kind, kind))
        and all(name in row["ms"] for name in must)
    ]


@lru_cache(maxsize=4096)
def _fastest(
    gpu: str, op: str, mode: str, dtype: torch.dtype, shape: tuple[int, ...], among: tuple[str, ...]
) -> tuple[str, str] | None:
    rows = _rows(gpu, op, mode, dtype, among)
    if not rows:
        return None
    asked = (shape[0], math.prod(shape[1:]))
    # in octaves: 500 rows are nearer to 1000 than to 100
    octaves = lambda a, b: abs(math.log2((a + 1) / (b + 1)))
    nearest = min(rows, key=lambda row: sum(map(octaves, row["shape"], asked)))
    times = {name: nearest["ms"][name] for name in among if name in nearest["ms"]}
    best = min(times, key=times.get)
    size = " x ".join(map(str, nearest["shape"]))
    return best, f"measured on {gpu} at {size} {nearest['dtype']}{_said(mode)}: {_list(times)}"


def forget() -> None:
    """After another TABLE."""
    _mean.cache_clear()
    _fastest.cache_clear()


def save(table: dict[str, Iterable[dict]], path: Path = PATH) -> None:
    """Put the GPUs of `table` into the file in place of what it has of them; all or nothing."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known |= {gpu: list(rows) for gpu, rows in table.items()}
    write({gpu: rows for gpu, rows in known.items() if rows}, path)


def write(table: dict[str, list[dict]], path: Path) -> None:
    """The whole table, a line for each entry, in one move."""
    lines = lambda rows: ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in rows)
    whole = lambda rows: f"[\n{lines(rows)}\n  ]" if rows else "[]"
    parts = [f"  {json.dumps(gpu)}: {whole(rows)}" for gpu, rows in sorted(table.items())]
    text = "{\n" + ",\n".join(parts) + "\n}\n" if parts else "{}\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
