"""python -m benchmarks.plot: write pictures and REPORT.md, only from the CSV files.

Every number is in a row of benchmarks/results/; cases without a row are listed as not timed.
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

    from cumo_model.analysis.plots import colours
except ModuleNotFoundError:  # a GPU machine without it: the tables are written there, the pictures elsewhere
    plt = None

from benchmarks import record
from benchmarks.record import Gap, Row
from cumo_kernels.tiles import hardware

BASE = "cumo-original"  # the baseline of speed-ups: the original's eager loop
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
    """Of rows that differ only in the timer, those of the graph, which exclude the host."""
    rows = sorted(rows, key=lambda row: row.timer == "graph")
    key = lambda r: (r.op, r.variant, r.mode, r.shape, r.tokens, r.sizes, r.pattern, r.dtype)
    return list({key(row): row for row in rows}.values())


def _case(row: Row) -> str:
    return f"{row.shape} {row.dtype}" + ("" if row.pattern == "uniform" else f" {row.pattern}")


def _variants(rows: Iterable[Row]) -> list[str]:
    """Ours first, then peers, the dense MLP last."""
    names = dict.fromkeys(row.variant for row in rows)
    return sorted(names, key=lambda name: (name == "dense", name == BASE, not name.startswith("cumo/"), name))


def _colours(names: list[str]) -> dict[str, tuple]:
    """A colour for each, no two the same, whatever their number."""
    return dict(zip(names, map(tuple, colours(len(names))), strict=True))


def _comparable(row: Row) -> tuple:
    """Equal for rows that may be compared: variants timed alternately by the same clock."""
    return (*record.case_of(row), row.mode, row.machine, row.run, row.timer)


def speedups(rows: list[Row]) -> dict[tuple[str, str], dict[str, float]]:
    """(op and mode, case) -> variant -> speed-up over the original's loop in the same run."""
    base = {_comparable(row): row.ms_p50 for row in rows if row.variant == BASE}
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: row.timer == "eager"):
        if _comparable(row) in base:
            key = f"{TITLES.get(row.op, row.op)}, {row.mode}", _case(row)
            found.setdefault(key, {})[row.variant] = base[_comparable(row)] / row.ms_p50
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
    colour_of = _colours(names)
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
                    axis.bar(place, value, width * 0.92, color=colour_of[name])
                    axis.text(place, value, f"{value:.2f}", ha="center", va="bottom", fontsize=6)
        axis.axhline(1, color="grey", lw=0.8, ls=":")
        axis.set_title(f"{title}, {MODES[mode]}", fontsize=8)
        axis.set_xticks(range(len(cases)), cases, fontsize=6)
        axis.set_ylabel("x the original's loop", fontsize=7)
        axis.tick_params(axis="y", labelsize=7)
        axis.margins(y=0.15)
        axis.set_visible(bool(cases))
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour_of[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 5), fontsize=7)
    figure.suptitle(rows[0].device, fontsize=9)
    return _save(figure, path)


def plot_roofline(rows: list[Row], path: Path) -> Path | None:
    """Axes per op: rate over arithmetic intensity, or bytes per second if the op has almost no FLOPs; with
    the data sheet's roofline if hardware.py has the machine."""
    rows = [r for r in _best_timer(rows) if r.gb_per_s and r.op != "scaling" and r.mode != "backward"]
    if not rows:
        return None
    ops = list(dict.fromkeys(r.op for r in rows))
    across = min(len(ops), 3)
    figure, axes = plt.subplots(
        -(-len(ops) // across), across, figsize=(4.6 * across, 0.8 + 3.4 * -(-len(ops) // across)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    names = _variants(rows)
    colour_of = _colours(names)
    gpu = next((g for g in hardware.GPUS if g.name == rows[0].machine), None)
    for axis, op in itertools.zip_longest(axes.flat, ops):
        axis.set_visible(op is not None)
        if op is not None:
            _roofline(axis, [r for r in rows if r.op == op], colour_of, gpu)
            axis.set_title(TITLES.get(op, op), fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour_of[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 5), fontsize=7)
    figure.suptitle(f"{rows[0].device}; o forward, square: forward and backward", fontsize=9)
    return _save(figure, path)


def _roofline(axis, rows: list[Row], colour_of: dict[str, tuple], gpu: hardware.Gpu | None) -> None:
    counted = all(r.tflops for r in rows)
    # FLOPs, or bytes, of the task
    across = (lambda r: r.tflops * 1e3 / r.gb_per_s) if counted else (lambda r: r.gb_per_s * r.ms_p50)
    height = (lambda r: r.tflops) if counted else (lambda r: r.gb_per_s)
    for row in rows:
        mark = "o" if row.mode == "forward" else "s"
        axis.scatter(across(row), height(row), s=18, marker=mark, alpha=0.7, color=colour_of[row.variant])
    low, high = min(map(across, rows)) / 2, max(map(across, rows)) * 2
    if gpu is not None and gpu.gb_per_s is not None:
        kinds = {r.dtype for r in rows}
        peak = gpu.tflops_fp32 if kinds == {"fp32"} else gpu.tflops_16
        xs = [low * (high / low) ** (i / 100) for i in range(101)]
        roof = [min(peak, gpu.gb_per_s * x / 1e3) if counted else gpu.gb_per_s for x in xs]
        axis.plot(xs, roof, "k-", lw=1)
    labels = ("FLOPs per byte of the task", "TFLOP/s") if counted else ("MB of the task", "GB/s")
    axis.set(xscale="log", yscale="log", xlabel=labels[0], ylabel=labels[1])
    axis.tick_params(which="both", labelsize=7)


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
        for name, colour in _colours(_variants(mine)).items():
            points = sorted((at(row), row.tflops) for row in mine if row.variant == name and row.tflops)
            axis.plot(
                [x for x, _ in points], [y for _, y in points], "o-", ms=3, lw=1, color=colour, label=name
            )
        axis.set(xscale="log", xlabel=sweep.replace("-", " "), ylabel="TFLOP/s, forward and backward")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=6)
    figure.suptitle(rows[0].device, fontsize=9)
    return _save(figure, path)


def plot_memory(rows: list[Row], path: Path) -> Path | None:
    """Axes of the memory saved for backward, and of the peak if measured (on a GPU). KiB per token."""
    layers = ("expert_mlp", "both", "uniform")
    rows = [row for row in _best_timer(rows) if (row.op, row.mode, row.pattern) == layers]
    titles = {
        "saved_bytes": "kept for backward, besides inputs and weights",
        "peak_bytes": "peak of forward and backward, above what was there before",
    }
    parts = {name: [row for row in rows if getattr(row, name)] for name in titles}
    parts = {name: part for name, part in parts.items() if part}
    if not parts:
        return None
    rows = [row for row in rows if row.saved_bytes or row.peak_bytes]
    cases, names = list(dict.fromkeys(map(_case, rows))), _variants(rows)
    colour_of = _colours(names)
    figure, axes = plt.subplots(
        len(parts), 1, figsize=(1.5 + 1.8 * len(cases), 0.6 + 3 * len(parts)), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    width = 0.8 / len(names)
    for axis, (column, part) in zip(axes[:, 0], parts.items(), strict=True):
        for row in part:
            place = cases.index(_case(row)) - 0.4 + width * (names.index(row.variant) + 0.5)
            height = getattr(row, column) / row.tokens / 1024
            axis.bar(place, height, width * 0.92, color=colour_of[row.variant])
        axis.set_xticks(range(len(cases)), cases, fontsize=7)
        axis.set_ylabel("KiB a token", fontsize=8)
        axis.set_title(f"expert layer: {titles[column]}", fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour_of[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4), fontsize=7)
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
    """Markdown: a line per case, mode and clock, a column per variant: milliseconds, and speed-up over the
    loop; then the other measurements of our own variants."""
    lines = []
    base = {_comparable(row): row.ms_p50 for row in rows if row.variant == BASE}
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
            groups.setdefault((record.case_of(row), _mode(row)), {})[row.variant] = row
        for (_, mode), by in groups.items():
            cells = []
            for name in names:
                row = by.get(name)
                if row is None:
                    cells.append("-")
                    continue
                text = milliseconds(row.ms_p50)
                if name != BASE and _comparable(row) in base:
                    text += f", {base[_comparable(row)] / row.ms_p50:.2f}x"
                if row.share_of_floor is not None:
                    text += f", {row.share_of_floor:.0%} of roofline"
                cells.append(text)
            first = next(iter(by.values()))
            lines.append(f"| {_whole_case(first)} | {mode} | {' | '.join(cells)} | {first.gate} |")
        lines += details(mine)
    return lines


def _mode(row: Row) -> str:
    return record.as_graph(row.mode) if row.timer == "graph" else row.mode


def _whole_case(row: Row) -> str:
    return f"{_case(row)} T={row.tokens} {row.sizes}"


def details(rows: list[Row]) -> list[str]:
    """The columns of our own rows that the first table has no room for."""
    lines = [
        "\n| case | mode | ours | TFLOP/s | GB/s | of dense | as fast as peers | KiB kept a token | peak MiB "
        "| error, gradient |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    number = lambda value, form, scale=1: "-" if value is None else format(value / scale, form)
    for row in rows:
        if not row.variant.startswith("cumo/"):
            continue
        peers = [
            r
            for r in rows
            if _comparable(r) == _comparable(row) and not r.variant.startswith(("cumo/", "dense"))
        ]
        cells = (
            _whole_case(row), _mode(row), row.variant, number(row.tflops, ".3g"), number(row.gb_per_s, ".3g"),
            number(row.ratio_to_dense, ".0%"),
            ", ".join(f"{peer.variant} {peer.ms_p50 / row.ms_p50:.2f}x" for peer in peers) or "-",
            number(row.saved_bytes, ".3g", 1024 * row.tokens), number(row.peak_bytes, ".4g", 2**20),
            f"{number(row.error, '.2f')}, {number(row.gradient_error, '.2f')}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def not_timed(gaps: list[Gap], rows: list[Row]) -> list[str]:
    """A line per variant and reason, without gaps that a later run closed."""
    newest: dict[tuple, str] = {}  # (case, variant and mode of the gap that it closes) -> run
    for row in rows:
        closes = {(row.variant, "all"), ("all", "all"), ("all", row.mode), (row.variant, _mode(row))}
        for variant, mode in closes | ({(row.variant, "backward")} if row.mode != "forward" else set()):
            key = (record.case_of(row), variant, mode)
            newest[key] = max(row.run, newest.get(key, ""))
        whole = ((row.op, "", 0, "", "", ""), "all", "all")  # a file that could not be loaded before
        newest[whole] = max(row.run, newest.get(whole, ""))
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for gap in gaps:
        closed_by = newest.get((record.case_of(gap), gap.variant, gap.mode), "")
        if closed_by <= gap.run and not (closed_by and gap.reason == record.NO_TIME):
            case = " ".join(word for word in (gap.op, gap.shape, gap.dtype) if word)
            case += f" T={gap.tokens}" if gap.op == "scaling" else ""
            grouped.setdefault((gap.variant, gap.mode, gap.reason), []).append(case)
    if not grouped:
        return []
    lines = ["\n#### Requested and not timed\n"]
    for (variant, mode, reason), cases in grouped.items():
        # whole cases are listed one by one: they are nowhere else in the report
        more = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
        named = ", ".join(cases) if variant == "all" else f"{cases[0]}{more}"
        who = "every variant" if variant == "all" else variant
        lines.append(f"- {who}{'' if mode == 'all' else f', {mode}'}: {reason} ({named})")
    return lines


def _triton(rows: list[Row], machine: str, shape: str, dtype: str, mode: str) -> float | None:
    """Milliseconds of the Triton backend for the expert layer with balanced routing, if it was measured."""
    wanted = (machine, "expert_mlp", shape, dtype, mode, "uniform")
    found = (
        row.ms_p50
        for row in rows
        if (row.machine, row.op, row.shape, row.dtype, row.mode, row.pattern) == wanted
        and row.variant == "cumo/triton"  # the backend that is predicted
    )
    return min(found, default=None)


def predictions(folder: Path, rows: list[Row]) -> list[str]:
    """The results of `benchmarks.predictions` by layer, with measurements of the same GPU, if any."""
    lines = []
    for path in sorted(folder.glob("*.csv")):
        found = list(csv.DictReader(path.read_text().splitlines()))
        gpu, dtype = found[0]["gpu"], found[0]["dtype"]
        lines += [
            f"\n## Predicted for {gpu}, {dtype}: not measured\n",
            "Computed by `python -m benchmarks.predictions` from the compiled Triton kernels: tiles,",
            "waves, registers and shared memory compared with the data sheet; without latency, caches,",
            "epilogues. First the GEMMs of the layer, then router, sort and combine at full bandwidth.\n",
            "| layer | forward ms | of roofline | forward + backward ms | of roofline | worst GEMM "
            "| route, sort, combine ms | spills | measured forward, both (x of the predicted GEMMs) |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for shape in dict.fromkeys(row["shape"] for row in found):
            layer = [row for row in found if row["shape"] == shape]
            gemms = [row for row in layer if "kernel" not in row["size"]]
            around = [row for row in layer if row["gemm"] in ("route", "sort", "combine")]
            total = lambda name, part: sum(float(row[name]) for row in part)
            sums = [(total("ms", part), total("floor_ms", part)) for part in (gemms[:2], gemms)]
            worst = min(gemms, key=lambda row: float(row["share_of_floor"]))
            measured = [_triton(rows, gpu, shape, dtype, mode) for mode in ("forward", "both")]
            cells = [f"{ms:.3g} | {floor / ms:.0%}" for ms, floor in sums]
            spills = sum(int(row["stack"]) > 0 for row in layer)
            moved = f"{total('ms', around):.3g}" if around else "-"
            seen = ", ".join(
                "not yet" if ms is None else f"{milliseconds(ms)} ({ms / predicted:.2f}x)"
                for ms, (predicted, _) in zip(measured, sums, strict=True)
            )
            lines.append(
                f"| {shape} | {' | '.join(cells)} | {worst['gemm']}, {float(worst['share_of_floor']):.0%} | "
                f"{moved} | {spills} of {len(layer)} | {seen} |"
            )
    return lines


HEAD = """# Benchmark report

Made by `python -m benchmarks.plot`, only from the CSV files in `results/` next to it. Every timing is behind
a correctness gate: in the same command the variant was compared with fp64 by the rule of
`cumo_kernels/testing.py`. `x` is the speed-up over the baseline, the original CuMo's eager loop (our port of
it). `dense` is a dense MLP of equal FLOPs without experts, an upper limit. Times are medians; ratios are only
between variants timed alternately in one run, by the same clock (a loop that synchronises with the host
cannot be a CUDA graph). Errors are in units of torch's own error. `of roofline` is the share of the data
sheet's roofline: the larger of FLOPs / peak and bytes / bandwidth, each operand moved once, divided by the
time. On a CPU with one thread, processor time is measured, since other jobs lengthen wall-clock time.
"""


def report(results: Path = record.RESULTS) -> Path:
    """Write the pictures of every machine next to its CSV files, and REPORT.md next to `results`."""
    rows, gaps = record.latest(record.read(results)), record.read_gaps(results)
    machines = sorted({row.machine for row in rows}, key=lambda name: (name.startswith("cpu"), name))
    lines = [HEAD]
    if not any(row.timer in ("eager", "graph", "host") for row in rows):
        lines += ["**Not yet measured on a GPU.** The results below are from a CPU.\n"]
    if not machines:
        lines += ["Nothing has been measured yet; run `python -m benchmarks`.\n"]
    for machine in machines:
        mine = [row for row in rows if row.machine == machine]
        every = lambda name, mine=mine: ", ".join(dict.fromkeys(str(getattr(row, name)) for row in mine))
        driver, triton = every("driver"), every("triton")
        lines += [f"\n## {machine}\n"]
        lines += [
            f"{every('device')}{f', driver {driver}' if driver else ''}; torch {every('torch')}, "
            f"Triton {triton or 'none'}; commit {every('commit')}; {every('date')}; "
            f"caches {every('cache')}.\n"
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
    lines += predictions(results.parent / "predictions" / "predicted", rows)
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
