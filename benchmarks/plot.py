"""python -m benchmarks.plot: pictures and REPORT.md from the CSV files, and from nothing else.

A number here is in a row of benchmarks/results/; what has no row is said to be not measured.
"""

import argparse
import csv
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
except ModuleNotFoundError:  # a bare GPU machine: the tables are written there, the pictures elsewhere
    plt = None

from benchmarks import record
from benchmarks.record import Gap, Row
from cumo_kernels import hardware

BASE = "cumo-original"  # speed-ups are against the original's eager loop
MODES = {"forward": "forward", "backward": "backward", "both": "forward and backward"}
TITLES = {
    "expert_mlp": "expert layer",
    "moe_layer": "MoE layer with router and losses",
    "model": "whole models",
    "grouped_gemm": "first GEMM of the layer",
    "route": "router",
    "permute_combine": "into expert order and back",
    "activate": "activation",
    "overhead": "host time of one call (tiny sizes)",
    "scaling": "scaling",
}


def _write(path: Path, write: Callable[[str], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix, delete=False) as file:
        pass
    try:
        write(file.name)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except BaseException:
        os.unlink(file.name)
        raise


def _save(figure, path: Path) -> Path:
    _write(path, lambda name: figure.savefig(name, dpi=120, format="png"))
    plt.close(figure)
    return path


def _best_timer(rows: Iterable[Row]) -> list[Row]:
    """Of rows that differ only in the timer the graph's, which has no host in it."""
    rows = sorted(rows, key=lambda row: row.timer == "graph")
    key = lambda r: (r.op, r.variant, r.mode, r.shape, r.tokens, r.sizes, r.pattern, r.dtype)
    return list({key(row): row for row in rows}.values())


def _case(row: Row) -> str:
    return f"{row.shape} {row.dtype}" + ("" if row.pattern == "uniform" else f" {row.pattern}")


def _variants(rows: Iterable[Row]) -> list[str]:
    """Ours first, then peers, the dense ceiling last."""
    names = dict.fromkeys(row.variant for row in rows)
    return sorted(names, key=lambda name: (name == "dense", name == BASE, not name.startswith("cumo/"), name))


def speedups(rows: list[Row]) -> dict[tuple[str, str], dict[str, float]]:
    """(op and mode, case) -> variant -> times as fast as the original's loop in the same run."""
    groups: dict[tuple, list[Row]] = {}
    for row in _best_timer(rows):
        groups.setdefault((row.op, row.mode, _case(row)), []).append(row)
    found = {}
    for (op, mode, case), group in groups.items():
        base = next((row.ms_p50 for row in group if row.variant == BASE), None)
        if base is not None:
            found[f"{TITLES.get(op, op)}, {mode}", case] = {row.variant: base / row.ms_p50 for row in group}
    return found


def plot_speedups(rows: list[Row], path: Path) -> Path | None:
    """A row of axes per op, a column per mode; bars in groups by case."""
    ops = {op: TITLES[op] for op in ("expert_mlp", "moe_layer", "model")}
    found = speedups([row for row in rows if row.op in ops])
    if not found:
        return None
    titles = [title for title in ops.values() if any(t.startswith(f"{title},") for t, _ in found)]
    modes = [mode for mode in MODES if any(t.endswith(f", {mode}") for t, _ in found)]
    names = [name for name in _variants(rows) if any(name in by for by in found.values())]
    colours = dict(zip(names, plt.get_cmap("tab10").colors * 2, strict=False))
    figure, axes = plt.subplots(
        len(titles), len(modes), figsize=(1 + 4.2 * len(modes), 0.8 + 2 * len(titles)), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    width = 0.8 / len(names)
    for (i, title), (j, mode) in itertools.product(enumerate(titles), enumerate(modes)):
        axis, key = axes[i][j], f"{title}, {mode}"
        cases = [case for t, case in found if t == key]
        for at, case in enumerate(cases):
            for n, name in enumerate(names):
                if (value := found[key, case].get(name)) is not None:
                    place = at - 0.4 + width * (n + 0.5)
                    axis.bar(place, value, width * 0.92, color=colours[name])
                    axis.text(place, value, f"{value:.2f}", ha="center", va="bottom", fontsize=6)
        axis.axhline(1, color="grey", lw=0.8, ls=":")
        axis.set_title(f"{title}, {MODES[mode]}", fontsize=8)
        axis.set_xticks(range(len(cases)), cases, fontsize=6)
        axis.set_ylabel("x the original's loop", fontsize=7)
        axis.tick_params(axis="y", labelsize=7)
        axis.margins(y=0.15)
        axis.set_visible(bool(cases))
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 5), fontsize=7)
    figure.suptitle(rows[0].device, fontsize=9)
    return _save(figure, path)


def plot_roofline(rows: list[Row], path: Path) -> Path | None:
    """Rate over arithmetic intensity; under the roof of the data sheet where hardware.py has the machine."""
    rows = [
        r for r in _best_timer(rows) if r.tflops and r.gb_per_s and r.op != "scaling" and r.mode != "backward"
    ]
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    intensity = lambda r: r.tflops * 1e3 / r.gb_per_s  # FLOPs per byte of the task
    names = _variants(rows)
    colours = dict(zip(names, plt.get_cmap("tab10").colors * 2, strict=False))
    for name in names:
        mine = [r for r in rows if r.variant == name]
        marks = {"forward": "o", "both": "s"}
        for mode, mark in marks.items():
            points = [r for r in mine if r.mode == mode]
            axis.scatter(
                [intensity(r) for r in points], [r.tflops for r in points], s=18, marker=mark, alpha=0.7,
                color=colours[name], label=name if mode == next(iter(marks)) else None,
            )  # fmt: skip
    gpu = next((g for g in hardware.GPUS if g.name == rows[0].machine), None)
    if gpu is not None:
        low, high = min(map(intensity, rows)) / 2, max(map(intensity, rows)) * 2
        xs = [low * (high / low) ** (i / 100) for i in range(101)]
        axis.plot(
            xs, [min(gpu.tflops_16, gpu.gb_per_s * x / 1e3) for x in xs], "k-", lw=1, label="data sheet"
        )
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte of the task", ylabel="TFLOP/s")
    axis.set_title(f"{rows[0].device}\no forward, square: forward and backward", fontsize=9)
    axis.legend(fontsize=7)
    return _save(figure, path)


def _size(row: Row, letter: str) -> int:
    return next(int(word[1:]) for word in f"T{row.tokens} {row.sizes}".split() if word[0] == letter)


def plot_scaling(rows: list[Row], path: Path) -> Path | None:
    rows = [row for row in _best_timer(rows) if row.op == "scaling"]
    sweeps = list(dict.fromkeys(row.shape for row in rows))
    if not sweeps:
        return None
    figure, axes = plt.subplots(
        1, len(sweeps), figsize=(4.2 * len(sweeps), 3.6), layout="constrained", squeeze=False
    )
    letter = {"over-tokens": "T", "over-experts": "E", "over-choices": "K"}
    for axis, sweep in zip(axes[0], sweeps, strict=True):
        mine = [row for row in rows if row.shape == sweep and row.mode == "both"]
        at = lambda r, name=letter[sweep]: _size(r, name)
        for name in _variants(mine):
            points = sorted((at(row), row.tflops) for row in mine if row.variant == name and row.tflops)
            axis.plot([x for x, _ in points], [y for _, y in points], "o-", ms=3, lw=1, label=name)
        axis.set(xscale="log", xlabel=sweep.replace("-", " "), ylabel="TFLOP/s, forward and backward")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=6)
    figure.suptitle(rows[0].device, fontsize=9)
    return _save(figure, path)


def plot_memory(rows: list[Row], path: Path) -> Path | None:
    rows = [
        row
        for row in _best_timer(rows)
        if row.op == "expert_mlp" and row.mode == "both" and row.pattern == "uniform" and row.saved_bytes
    ]
    if not rows:
        return None
    cases, names = list(dict.fromkeys(map(_case, rows))), _variants(rows)
    figure, axis = plt.subplots(figsize=(1.5 + 1.8 * len(cases), 3.6), layout="constrained")
    width = 0.8 / len(names)
    for j, name in enumerate(names):
        by_case = {_case(row): row.saved_bytes / row.tokens / 1024 for row in rows if row.variant == name}
        places = [cases.index(case) - 0.4 + width * (j + 0.5) for case in by_case]
        axis.bar(places, list(by_case.values()), width * 0.92, label=name)
    axis.set_xticks(range(len(cases)), cases, fontsize=7)
    axis.set(ylabel="KiB kept for backward per token", title="expert layer, besides inputs and weights")
    axis.legend(fontsize=7)
    return _save(figure, path)


PICTURES = {
    "speedup.png": plot_speedups,
    "roofline.png": plot_roofline,
    "scaling.png": plot_scaling,
    "memory.png": plot_memory,
}


def milliseconds(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def table(rows: list[Row]) -> list[str]:
    """Markdown: a line per case and mode, a column per variant: milliseconds, and speed-up over the loop."""
    rows = _best_timer(rows)
    lines = []
    for op in dict.fromkeys(row.op for row in rows):
        mine = [row for row in rows if row.op == op]
        names = _variants(mine)
        lines += [f"\n#### {TITLES.get(op, op)} (`{op}`)\n"]
        lines += [
            "| case | mode | " + " | ".join(names) + " | remark |",
            "|---|---|" + "---|" * (len(names) + 1),
        ]
        groups: dict[tuple, dict[str, Row]] = {}
        for row in mine:
            groups.setdefault((_case(row), row.tokens, row.sizes, row.mode), {})[row.variant] = row
        for (case, tokens, sizes, mode), by in groups.items():
            cells = []
            for name in names:
                row = by.get(name)
                if row is None:
                    cells.append("-")
                    continue
                text = milliseconds(row.ms_p50)
                if BASE in by and name != BASE:
                    text += f", {by[BASE].ms_p50 / row.ms_p50:.2f}x"
                if row.share_of_floor is not None:
                    text += f", {row.share_of_floor:.0%} of floor"
                cells.append(text)
            remark = next(iter(by.values())).gate
            lines.append(f"| {case} T={tokens} {sizes} | {mode} | {' | '.join(cells)} | {remark} |")
    return lines


def not_timed(gaps: list[Gap], rows: list[Row]) -> list[str]:
    """A line per variant and reason; a gap that a later run closed is none."""
    newest = {(r.op, r.variant, r.mode, r.shape, r.pattern, r.dtype): r.run for r in rows}
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for gap in gaps:
        mode = "forward" if gap.mode == "all" else "both"
        if newest.get((gap.op, gap.variant, mode, gap.shape, gap.pattern, gap.dtype), "") <= gap.run:
            case = f"{gap.op} {gap.shape} {gap.dtype}"
            grouped.setdefault((gap.variant, gap.mode, gap.reason), []).append(case)
    if not grouped:
        return []
    lines = ["\n#### Asked for and not timed\n"]
    for (variant, mode, reason), cases in grouped.items():
        more = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
        lines.append(f"- {variant}{', backward' if mode == 'backward' else ''}: {reason} ({cases[0]}{more})")
    return lines


def _ours(rows: list[Row], machine: str, shape: str, dtype: str, mode: str) -> float | None:
    """Milliseconds of our fastest backend for the expert layer with balanced routing, if it was measured."""
    wanted = (machine, "expert_mlp", shape, dtype, mode, "uniform")
    found = (
        row.ms_p50
        for row in rows
        if (row.machine, row.op, row.shape, row.dtype, row.mode, row.pattern) == wanted
        and row.variant.startswith("cumo/")
    )
    return min(found, default=None)


def predictions(folder: Path, rows: list[Row]) -> list[str]:
    """What `benchmarks.predict` computed, layer by layer, beside the measurements of the same GPU, if any."""
    lines = []
    for path in sorted(folder.glob("*.csv")):
        found = list(csv.DictReader(path.read_text().splitlines()))
        gpu, dtype = found[0]["gpu"], found[0]["dtype"]
        lines += [
            f"\n## Predicted for {gpu}, {dtype}: not measured\n",
            "Computed by `python -m benchmarks.predict` from the Triton backend's compiled kernels: tiles,",
            "waves, registers and shared memory against the data sheet; no latency, caches, epilogues. First",
            "the GEMMs of the layer, then what router, sorting and weighted sum move at full bandwidth.\n",
            "| layer | forward ms | of floor | forward + backward ms | of floor | worst GEMM "
            "| route, sort, combine ms | spills | measured forward, both |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for shape in dict.fromkeys(row["shape"] for row in found):
            layer = [row for row in found if row["shape"] == shape]
            gemms = [row for row in layer if "kernel" not in row["size"]]
            around = [row for row in layer if row["gemm"] in ("route", "sort", "combine")]
            total = lambda name, part: sum(float(row[name]) for row in part)
            sums = [(total("ms", part), total("floor_ms", part)) for part in (gemms[:2], gemms)]
            worst = min(gemms, key=lambda row: float(row["share_of_floor"]))
            measured = [_ours(rows, gpu, shape, dtype, mode) for mode in ("forward", "both")]
            cells = [f"{ms:.3g} | {floor / ms:.0%}" for ms, floor in sums]
            spills = sum(int(row["stack"]) > 0 for row in layer)
            moved = f"{total('ms', around):.3g}" if around else "-"
            seen = ", ".join("not yet" if ms is None else milliseconds(ms) for ms in measured)
            lines.append(
                f"| {shape} | {' | '.join(cells)} | {worst['gemm']}, {float(worst['share_of_floor']):.0%} | "
                f"{moved} | {spills} of {len(layer)} | {seen} |"
            )
    return lines


HEAD = """# Benchmark report

Made by `python -m benchmarks.plot` from the CSV files in `benchmarks/results/` and from nothing else. Every
timing stands behind a correctness gate: in the same command the variant was held against fp64 by the rule of
`cumo_kernels/testing.py`. `x` is how many times as fast as the original CuMo's eager loop (our port of it);
`dense` is a dense MLP of equal FLOPs without experts, the ceiling. Medians; variants of one case took turns.
On a CPU with one thread it is processor time that is measured, since other jobs lengthen the wall's.
"""


def report(results: Path = record.RESULTS) -> Path:
    """Write the pictures of every machine beside its CSV files, and REPORT.md beside `results`."""
    rows, gaps = record.latest(record.read(results)), record.read_gaps(results)
    machines = sorted({row.machine for row in rows}, key=lambda name: (name.startswith("cpu"), name))
    lines = [HEAD]
    if not any(row.timer in ("eager", "graph") for row in rows):
        lines += ["**Not yet measured on a GPU.** What follows ran on a CPU, on the reference backend.\n"]
    if not machines:
        lines += ["Nothing has been measured yet: `python -m benchmarks` does.\n"]
    for machine in machines:
        mine = [row for row in rows if row.machine == machine]
        first = mine[-1]
        commits = ", ".join(dict.fromkeys(row.commit for row in mine))
        lines += [f"\n## {machine}\n"]
        lines += [
            f"{first.device}{f', driver {first.driver}' if first.driver else ''}; torch {first.torch}, "
            f"Triton {first.triton or 'none'}; commit {commits}; {first.date}; caches {first.cache}.\n"
        ]
        if plt is None:
            lines += [
                "No pictures: matplotlib is not installed here; `python -m benchmarks.plot` draws them.\n"
            ]
        for name, draw in PICTURES.items():
            if plt is not None and draw(mine, results / machine / name) is not None:
                lines += [f"![{name.removesuffix('.png')}](results/{machine}/{name})"]
        lines += table(mine)
        lines += not_timed([gap for gap in gaps if gap.machine == machine], mine)
    lines += predictions(results.parent / "predicted", rows)
    path = results.parent / "REPORT.md"
    _write(path, lambda name: Path(name).write_text("\n".join(lines) + "\n"))
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    print(report(parser.parse_args(argv).results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
