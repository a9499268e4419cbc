"""summary.md: the results, in under 11,000 characters, so that the end of a reply contains all of it."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks import record
from benchmarks.cases.shapes import SHAPES
from benchmarks.gpu.engine import Outcome

MOST = 10_000  # characters; a lent machine's reply shows the last 12,000, and `main` adds some
MIDDLE = 2_500  # of these, reserved for failures and kernels after the table of times
FILES = {  # op of a benchmark -> its file
    "expert_mlp": "experts", "moe_layer": "layer", "route": "routing", "permute_combine": "permutation",
    "packed_expert_mlp": "packed", "lora_expert_mlp": "lora", "scored_route": "routers",
    "activate": "activation", "grouped_gemm": "grouped_gemm",
}  # fmt: skip
LAYERS = ("expert_mlp", "moe_layer", "packed_expert_mlp", "lora_expert_mlp")  # in the table of times
REASON = 150  # characters of a failure's reason


def steps(outcomes: Iterable[Outcome]) -> list[str]:
    lines = ["| step | verdict | seconds | last line |", "|---|---|---|---|"]
    return lines + [
        f"| {o.name} | {o.verdict} | {o.seconds:.0f} | {o.remark[:90].replace('|', '/')} |" for o in outcomes
    ]


def _read(path: Path) -> tuple[int, dict[tuple[str, str], list[str]], list[str]]:
    """Of a file of verify -> its cases, (reason, command) of each that failed, what was not checked."""
    try:
        report = json.loads(path.read_text())
        bad = {}
        for row in report["results"]:
            if row["failures"]:
                device = "" if row["device"] == "cuda" else f" --device {row['device']}"
                command = f"verify --backend {row['backend']}{device} --case '{row['case']}'"
                bad[row["backend"], row["case"]] = [
                    f"FAILED {row['backend']}: {_reason(row['failures'][0])}",
                    f"    {report['switches']}python -m cumo_kernels {command}",
                ]
        return len(report["results"]), bad, [str(line) for line in report["not_checked"]]
    except (OSError, ValueError, KeyError, TypeError):
        return 0, {}, []


def _reason(text: str) -> str:
    """The start of the reason, with only the names of files in a stack trace."""
    text = re.sub(r'File "[^"]*?([^/"]+)", line (\d+) in', r"\1:\2", text)
    return " ".join(text.split())[:REASON]


def failures(out: Path) -> list[str]:
    """Every failed case, once, with its first reason and the command that repeats it."""
    found, lines = {}, []
    for name in ("smoke", "verify"):
        number, bad, missing = _read(out / f"{name}.json")
        if number:
            lines.append(f"{name}: {number} cases, {len(bad)} failed")
        found |= bad
        # the last: cases that this run did not reach
        lines += [f"{name}: not checked: {_reason(line)}" for line in missing if re.search("case|rest", line)]
    return [*lines, *(line for pair in found.values() for line in pair)]


def refusals(results: Path, runs: set[str] | None) -> list[str]:
    """Our variants that a benchmark's gate refused, or that broke or hung there, with the command."""
    lines = []
    for gap in record.read_gaps(results):
        if (runs is None or gap.run in runs) and record.is_ours(gap.variant) and record.is_fault(gap):
            file = FILES.get(gap.op, gap.op)
            lines.append(f"FAILED bench {gap.variant} {gap.mode}: {_reason(gap.reason)}")
            backend, _, pdl = gap.variant.removeprefix("cumo/").partition("+")
            shape = f"--shape {gap.shape} " if gap.shape in SHAPES else ""
            lines.append(
                f"    {'CUMO_PDL=1 ' if pdl else ''}python -m benchmarks --only {file} {shape}"
                f"--pattern {gap.pattern} --dtype {gap.dtype} --backend {backend.split()[0]}"
            )
    return lines


def _best(rows: list[record.Row], mode: str) -> record.Row | None:
    """The graph's time, which excludes the host, else the eager one."""
    mine = [row for row in rows if row.mode == mode]
    graph = [row for row in mine if row.timer == "graph"]
    return (graph or mine or [None])[-1]


def times(results: Path, runs: set[str] | None) -> list[str]:
    """A line per case and variant of the layers: milliseconds, TFLOP/s, shares and ratios."""
    rows = [row for row in record.read(results) if runs is None or row.run in runs]
    rows = [row for row in rows if row.op in LAYERS]
    lines, cases = [], {}
    for row in record.latest(rows):
        cases.setdefault((row.op, row.shape, row.tokens, row.pattern, row.dtype), {}).setdefault(
            row.variant, []
        ).append(row)
    if cases:
        lines = [
            "",
            "ms of a CUDA graph (eager if there is none), cold L2; TF/s; share of the data sheet's "
            "roofline; speed over dense cuBLAS and over torch's grouped_mm",
            "| case | variant | forward | TF/s | roofline | dense | grouped_mm | both | TF/s | dense |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
    for (op, shape, tokens, pattern, dtype), variants in cases.items():
        forward = {name: _best(rows, "forward") for name, rows in variants.items()}
        both = {name: _best(rows, "both") for name, rows in variants.items()}

        def ratio(of: dict, name: str, other: str) -> str:
            a, b = of.get(name), of.get(other)
            return "-" if a is None or b is None else f"{b.ms_p50 / a.ms_p50:.2f}"

        show = lambda row: ("-", "-") if row is None else (f"{row.ms_p50:.4g}", f"{row.tflops or 0:.0f}")
        label = f"{op} {shape} T={tokens}{'' if pattern == 'uniform' else ' ' + pattern}"
        label += "" if dtype == "bf16" else f" {dtype}"
        rival = next((name for name in variants if "grouped_mm" in name), "")
        for name in sorted(variants, key=lambda name: (not record.is_ours(name), name)):
            roof = forward[name].share_of_floor if forward[name] is not None else None
            cells = (
                label, name, *show(forward[name]), "-" if roof is None else f"{roof:.0%}",
                ratio(forward, name, "dense"), ratio(forward, name, rival), *show(both[name]),
                ratio(both, name, "dense"),
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
            label = ""
    return lines


def kernels(out: Path) -> list[str]:
    """The ceilings, and the longest kernels of each layer with backward."""
    path, lines = out / "kernels.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            lines.append(_kernels(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            lines.append(f"kernels: a damaged line: {line[:40]}")
    return lines


def _kernels(row: dict) -> str:
    if row["kind"] == "ceilings":
        return f"ceilings: {row['tflops']:.0f} TF/s bf16 product, {row['gb_per_s']:.0f} GB/s copy"
    if row["kind"] == "broken":
        return f"kernels BROKEN {row['job']}: {' '.join(row['why'].split())[-REASON:]}"
    top = ", ".join(f"{_short(name)} {us[0]:.0f}" for name, us in list(row["us"]["both"].items())[:5])
    host = "/".join(f"{row['host_us'][mode]:.0f}" for mode in ("forward", "both"))
    return f"us of {row['layer']} {row['backend']}: {top}; host {host}"


def _short(name: str) -> str:
    return name.removeprefix("void ").removeprefix("cumo::").split("(")[0].split("<")[0][-28:]


def _cut(lines: list[str], room: int) -> list[str]:
    """As many of `lines` as fit into `room` characters, and the number of the rest."""
    if sum(len(line) + 1 for line in lines) <= room:
        return lines
    kept = []
    for line in lines:
        room -= len(line) + 1
        if room < 60:  # for the last line
            break
        kept.append(line)
    return [*kept, f"... {len(lines) - len(kept)} more lines are in summary.md ..."]


def write(head: str, outcomes: list[Outcome], out: Path, results: Path, runs: set[str] | None) -> str:
    """Write summary.md atomically -> the text to print: steps, times, and what else fits."""
    top, wrong, table = [head, "", *steps(outcomes), ""], failures(out), times(results, runs)
    wrong += refusals(results, runs)
    lines = kernels(out)
    part = out / ".summary.md.part"
    part.write_text("\n".join([*top, *wrong, *lines, *table]) + "\n")
    part.replace(out / "summary.md")
    size = lambda lines: sum(len(line) + 1 for line in lines)
    table = _cut(table, MOST - MIDDLE - size(top))
    room = MOST - size(top) - size(table)
    # failures first, but keep a line or two of kernels: the machine's ceilings
    lines = _cut(lines, max(room - size(wrong), min(room // 3, size(lines))))
    return "\n".join([*top, *_cut(wrong, room - size(lines)), *lines, *table]) + "\n"
