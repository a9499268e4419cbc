"""measured.json: timings of the backends by GPU, op and size, used by the automatic choice.

    {gpu: [{"op": ..., "mode": "both", "dtype": "bfloat16", "shape": [rows, columns], "ms": {backend: ...}}]}

gpu is a name of hardware.py, or "cpu" for all CPUs; shape is that of the op's first tensor; mode is "forward"
without gradients or "both" with backward. `python -m benchmarks.choose` writes the file from timings that
passed the accuracy check; do not edit it by hand. The entry with the nearest number of rows, then of columns,
is used. The backend that is fastest over all entries is chosen there, unless another is faster by more than
`NOISE`. Graphs being compiled get the same choice; where it depends on a symbolic size, they are guarded only
at the size at which it changes. An exported program must not depend on its example's sizes: where a size is
symbolic and not known to be below a limit, the choice for larger sizes is used. Without entries the first
of dispatch.BACKENDS that can run is chosen.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from cumo_kernels.files import write_whole
from cumo_kernels.tiles.hardware import INTERPRETER, gpu_of
from cumo_kernels.tiles.tuning import BATCH_INVARIANT
from cumo_kernels.tracing import constant

PATH = Path(__file__).with_name("measured.json")
TABLE: dict[str, list[dict]] = json.loads(PATH.read_text())
CPU = "cpu"
NOISE = 0.03  # relative difference between timings of the same code
ALIKE = {"float16": "bfloat16"}  # the same instructions and the same bytes


def machine_of(device: torch.device) -> str:
    """Name of the machine whose entries apply to tensors on `device`."""
    gpu = gpu_of(device)
    return CPU if gpu is INTERPRETER else gpu.name


# (most rows, ((most columns, backend), ...)), ...: the first that fits is used, None means no limit
Decisions = tuple[tuple[int | None, tuple[tuple[int | None, str], ...]], ...]


def decisions(
    op: str, device: torch.device, dtype: torch.dtype, among: Sequence[str], with_backward: bool
) -> Decisions:
    """By sizes, the fastest of `among` by the rule in the module docstring; without data the first.

    `with_backward` compares forward and backward together: backward runs on the backend that ran forward.
    """
    first = ((None, ((None, among[0]),)),)
    if len(among) == 1:
        return first
    return _known(device, op, _mode(with_backward), dtype, tuple(among)) or first


def pick(by_rows: Decisions, shape: Sequence[int]) -> str:
    """The backend for an op whose first tensor has that shape."""
    if len(by_rows) == 1 and len(by_rows[0][1]) == 1:
        return by_rows[0][1][0][1]
    rows, columns = _size(shape)
    for most_rows, by_columns in by_rows:
        if most_rows is None or _is_true(rows <= most_rows):
            for most_columns, name in by_columns:
                if most_columns is None or _is_true(columns <= most_columns):
                    return name
    raise AssertionError("the last entry must have no limit")


@constant
def _exporting() -> bool:
    return (
        torch.compiler.is_exporting()
    )  # asked in a traced function, torch answers True for torch.compile too


def _is_true(condition: bool | torch.SymBool) -> bool:
    """The condition; in an exported program whether it is true for all its sizes, without a guard."""
    if not _exporting():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

    return statically_known_true(condition)


def reason(op: str, x: torch.Tensor, among: Sequence[str], with_backward: bool) -> str | None:
    """The timings that decide for `x`, as text."""
    mode, among, machine = _mode(with_backward), tuple(among), machine_of(x.device)
    known = _rows(machine, op, mode, x.dtype, among)
    if not known or BATCH_INVARIANT:
        return None
    entry = _nearest(known, *_size(x.shape))
    size = " x ".join(map(str, entry["shape"]))
    where = "CPUs" if machine == CPU else machine
    return f"measured on {where} at {size} {entry['dtype']}{_said(mode)}: {_list(_times(entry, among))}"


def _mode(with_backward: bool) -> str:
    return "both" if with_backward else "forward"


def _size(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns, which may be symbolic."""
    rows, columns = 1, 1
    for i, length in enumerate(shape):
        rows, columns = (length, columns) if i == 0 else (rows, columns * length)
    return rows, columns


@constant
def _known(device: torch.device, op: str, mode: str, dtype: torch.dtype, among: tuple[str, ...]) -> Decisions:
    return _decided(machine_of(device), op, mode, dtype, among)


@lru_cache(maxsize=4096)
def _decided(machine: str, op: str, mode: str, dtype: torch.dtype, among: tuple[str, ...]) -> Decisions:
    known = _rows(machine, op, mode, dtype, among)
    # a row's result must not depend on the number of rows, so neither may its backend
    if not known or BATCH_INVARIANT:
        return ()

    favourite = _fastest_of_all(known, among)

    def best(rows: int, columns: int) -> str:
        times = _times(_nearest(known, rows, columns), among)
        fastest = min(times, key=times.get)
        noise = times.get(favourite, math.inf) <= (1 + NOISE) * times[fastest]
        return favourite if noise else fastest

    rows, columns = ({_size(row["shape"])[i] for row in known} for i in (0, 1))
    return _steps(rows, lambda some: _steps(columns, lambda few: best(some, few)))


def _steps(sizes: set[int], decide: Callable[[int], Any]) -> tuple[tuple[int | None, Any], ...]:
    """Decisions by upper size limit; neighbours with the same decision are merged."""
    steps: list[tuple[int | None, Any]] = []
    ascending = sorted(sizes)
    for size, following in zip(ascending, [*ascending[1:], None], strict=True):
        # the middle on a logarithmic scale: 500 rows are nearer to 1000 than to 100
        most = None if following is None else math.floor(math.sqrt((size + 1) * (following + 1)) - 1)
        decided = decide(size)
        if steps and steps[-1][1] == decided:
            steps.pop()
        steps.append((most, decided))
    return tuple(steps)


def _nearest(known: list[dict], rows: int, columns: int) -> dict:
    octaves = lambda a, b: abs(math.log2((a + 1) / (b + 1)))
    sizes = [_size(row["shape"]) for row in known]
    # round each size to the nearest in any entry, as `_decided` does, then take the entry nearest to both
    rows, columns = (
        min(sorted(all_of), key=lambda one, size=size: octaves(one, size))
        for all_of, size in zip(zip(*sizes, strict=True), (rows, columns), strict=True)
    )
    return min(known, key=lambda row: sum(map(octaves, _size(row["shape"]), (rows, columns))))


def _times(entry: dict, among: Iterable[str]) -> dict[str, float]:
    return {name: entry["ms"][name] for name in among if name in entry["ms"]}


def _fastest_of_all(known: list[dict], among: tuple[str, ...]) -> str:
    """The fastest by the geometric mean over the entries in which all were timed."""
    whole = [row["ms"] for row in known if all(name in row["ms"] for name in among)]
    mean = lambda name: sum(math.log(ms[name]) for ms in whole)
    return min(among, key=mean)


def _spoken(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _said(mode: str) -> str:
    return " with backward" if mode == "both" else ""


def _list(times: dict[str, float]) -> str:
    return ", ".join(f"{name} {ms:.4g} ms" for name, ms in times.items())


def _rows(machine: str, op: str, mode: str, dtype: torch.dtype, among: Iterable[str]) -> list[dict]:
    """Entries in which all of `among` were timed; torch may be missing in older GPU entries."""
    kind, must = _spoken(dtype), [name for name in among if name != "torch" or machine == CPU]
    return [
        row
        for row in TABLE.get(machine, ())
        if (row["op"], row["mode"], ALIKE.get(row["dtype"], row["dtype"]))
        == (op, mode, ALIKE.get(kind, kind))
        and all(name in row["ms"] for name in must)
    ]


def forget() -> None:
    """Clear the caches; to be called after TABLE changes."""
    _decided.cache_clear()


def save(table: dict[str, Iterable[dict]], path: Path = PATH) -> None:
    """Replace the entries of the GPUs in `table`; all or nothing."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known |= {gpu: list(rows) for gpu, rows in table.items()}
    write({gpu: rows for gpu, rows in known.items() if rows}, path)


def write(table: dict[str, list[dict]], path: Path) -> None:
    """Write the whole table atomically, one line per entry."""
    lines = lambda rows: ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in rows)
    whole = lambda rows: f"[\n{lines(rows)}\n  ]" if rows else "[]"
    parts = [f"  {json.dumps(gpu)}: {whole(rows)}" for gpu, rows in sorted(table.items())]
    text = "{\n" + ",\n".join(parts) + "\n}\n" if parts else "{}\n"
    write_whole(path, text)
