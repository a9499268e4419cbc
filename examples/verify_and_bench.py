"""Check the results and measure the speed of a layer on this machine: explain, verify, then the benchmarks.

    python examples/verify_and_bench.py                       # minutes on a GPU, a short rehearsal on a CPU
    python examples/verify_and_bench.py --full --log gpu.txt  # all cases and layers

It needs a checkout, because the benchmarks are not installed. Times are measured only if verify passes, and
each benchmark row is checked again before it is timed. Please add the log to a bug report.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]  # the checkout
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--full", action="store_true", help="all cases of verify and of the benchmarks")
parser.add_argument("--log", type=Path, help="also write everything to this file")
args = parser.parse_args()
log = args.log.open("w") if args.log else None


def say(line: str) -> None:
    print(line, end="", flush=True)
    if log:
        log.write(line)
        log.flush()


def run(command: str) -> int:
    say(f"$ python -m {command}\n")
    words, pipe = [sys.executable, "-m", *shlex.split(command)], subprocess.PIPE
    process = subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        say(line)
    return process.wait()


gpu = torch.cuda.is_available()
if gpu:
    run("cumo_kernels self-check")  # otherwise the first call of an op would run it
run("cumo_kernels explain")
few = "" if args.full else " --few" if gpu else " --tiny"
if run("cumo_kernels verify --no-interpreter" + few + (" --workers 8" if gpu else "")):
    say("verify failed, so nothing is timed: please report it with all output above\n")
    sys.exit(1)
if gpu:
    sys.exit(run("benchmarks --dry" + (" --full" if args.full else " --only layer --only experts")))
say("times on a CPU do not predict times on a GPU\n")
small = "" if args.full else " --only experts --tiny --shape clip-1-crop --seconds 0.2"
sys.exit(run("benchmarks --dry" + small))
