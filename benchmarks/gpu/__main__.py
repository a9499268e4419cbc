"""python -m benchmarks.gpu: the command behind `make gpu`; see the package's docstring."""

import argparse
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import benchmarks.gpu as gate
from benchmarks import record
from benchmarks.gpu import summary
from benchmarks.gpu.artifacts import FOLDER
from benchmarks.gpu.engine import ROOT, Step, run, unproven
from benchmarks.gpu.plan import BUDGET, PARTS, Place, listing, plan
from cumo_kernels.verification import verified

REHEARSAL = 600.0  # seconds; it should take under 360 on two cores


RESULTS = (
    "benchmarks/results",
    "benchmarks/REPORT.md",
    "cumo_kernels/tiles/configs",
    "cumo_kernels/tiles/measured.json",
    "cumo_kernels/verification/verified.json",
)


def files(tree: Path) -> dict[str, tuple[int, int]]:
    """Path in `tree` -> time and size, of every file that benchmarks, tuning and verify may write."""
    found = [
        path for name in RESULTS for path in ((tree / name), *(tree / name).rglob("*")) if path.is_file()
    ]
    return {str(path.relative_to(tree)): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


def pack(place: Place, before: Mapping[str, tuple[int, int]]) -> None:
    """Write results.tgz: the files that were written so far, and none that is as in `before`.

    So it can be unpacked into a tree that has results of another run.
    """
    part = place.out / ".results.tgz.part"
    with tarfile.open(part, "w:gz") as tar:
        for name, state in files(place.tree).items():
            if before.get(name) != state:
                tar.add(place.tree / name, name)
    part.replace(place.out / "results.tgz")


def _folder(given: Path | None, now: datetime) -> Path:
    """--out, else $OUT if the machine sets it, else runs/gpu/<time>."""
    if given is None and os.environ.get("OUT"):
        given = Path(os.environ["OUT"])
    return (given or ROOT / "runs" / "gpu" / f"{now:%Y%m%dT%H%M%S}").resolve()


def _carried_commit(folder: Path = FOLDER) -> str | None:
    """The commit of a tree without .git: that of the artefacts, if made from the same kernels."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        same = all(verified.source_of(name) == source for name, source in manifest["sources"].items())
        return manifest["commit"] if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _run(part: str, steps: list[Step], place: Place, budget: float, head: str) -> int:
    place.out.mkdir(parents=True, exist_ok=True)
    before, held, shown = record.runs(place.results), files(place.tree), ""

    def note(outcomes: list) -> None:
        nonlocal shown
        new = record.runs(place.results) - before
        shown = summary.write(head, outcomes, place.out, place.results, new)
        pack(place, held)

    outcomes = run(steps, budget, place.out / "log.txt", note)
    if place.rehearses:
        shutil.rmtree(place.tree, ignore_errors=True)  # results.tgz contains it
    print(f"\n{shown}\nin {place.out}")
    missing = unproven(outcomes, steps)
    for o in missing:
        print(f"required, but {o.verdict}: {o.name} ({o.remark[:100]})")
    return int(bool(missing))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=gate.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    budget = os.environ.get("BUDGET")
    parser.add_argument("--budget", type=float, default=float(budget) if budget else None, help="seconds")
    parser.add_argument("--out", type=Path, help="folder; default $OUT, else runs/gpu/<time>")
    parser.add_argument("--part", choices=PARTS, default="prove", help="which of the two parts")
    parser.add_argument("--rehearse", action="store_true", help="both parts on a CPU, at tiny sizes")
    parser.add_argument("--only", action="append", help="names of steps to run; default: all")
    parser.add_argument(
        "--case-seconds",
        type=float,
        default=Place.case_seconds,
        help="time limit of one case of smoke",
    )
    parser.add_argument("--list", action="store_true", help="print both plans and exit")
    args = parser.parse_args(argv)
    import torch

    if args.list:
        place = Place("cuda", Path("OUT"), (9, 0))
        print("\n\n".join(listing(part, plan(part, place)) for part in PARTS))
        return 0
    if not args.rehearse and not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device on this machine, so nothing can run (except --rehearse)")
        return 1
    if record.commit() == "unknown" and (known := _carried_commit()):
        os.environ["CUMO_COMMIT"] = known
        record.commit.cache_clear()
    now = datetime.now(UTC)
    place = Place("cpu" if args.rehearse else "cuda", _folder(args.out, now),
                  None if args.rehearse else torch.cuda.get_device_capability(),
                  case_seconds=args.case_seconds)  # fmt: skip
    name = "a rehearsal on a CPU: no GPU was measured" if args.rehearse else torch.cuda.get_device_name()
    parts = PARTS if args.rehearse else (args.part,)
    steps = [step for part in parts for step in plan(part, place)]
    steps = list({step.name: step for step in steps}.values())  # the first steps of both parts only once
    steps.sort(key=lambda step: step.always)
    unknown = set(args.only or ()) - {step.name for step in steps}
    if unknown:
        parser.error(f"--only must be one of {[step.name for step in steps]}, got {sorted(unknown)}")
    steps = [step for step in steps if not args.only or step.name in args.only]
    seconds = args.budget or (REHEARSAL if args.rehearse else BUDGET[args.part])
    head = f"# {name}, torch {torch.__version__}, commit {record.commit()}, {now:%Y-%m-%d %H:%M} UTC, "
    return _run("+".join(parts), steps, place, seconds, head + f"part {'+'.join(parts)}, {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
