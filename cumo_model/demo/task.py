"""Run one task of the demo in a separate process: python -m cumo_model.demo.task NAME RUN_DIR.

On two CPU cores, two processes with one thread each are nearly twice as fast as one process with two threads.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from transformers.utils import logging

from cumo_model.demo.ablation import run_row
from cumo_model.demo.folder import Run
from cumo_model.demo.stages import TASKS
from cumo_model.training.recover import Interrupted


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help=f"one of {', '.join(TASKS)}, or ablate:ROW:SEED")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--position", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()  # bars for loading and saving would disturb that of training
    # a run is identified by the paths in its recipe: relative to this folder they are the same from every
    # working directory, and in runs/demo they are those of the shipped recipes
    folder = args.folder.resolve()
    os.chdir(folder.parent.parent)
    try:
        run = Run(Path(folder.parent.name, folder.name), args.position)
        if args.name.startswith("ablate:"):
            _, row, seed = args.name.split(":")
            run_row(run, row, int(seed))
        else:
            TASKS[args.name](run)
    except Interrupted:
        return 130
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        print(f"cumo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
