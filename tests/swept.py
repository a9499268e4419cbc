"""Whether `make test-all` has passed on the kernels as they are.

    python -m tests.swept            ends with 0 if it has, with 1 if not
    python -m tests.swept --record   says that it has: `make test-all` does so where all of it passed

What is swept is decided by these files alone, so their hash says it; it is committed in tests/swept.txt.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from cumo_kernels.extension import hash_of_files

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_suffix(".txt")
DECIDE = ("csrc/*", "cumo_kernels/**/*.py", "benchmarks/gpu/*.py", "tests/kernels/*.py", "constraints.txt")


def files(root: Path = ROOT) -> Iterator[Path]:
    for pattern in DECIDE:
        yield from root.glob(pattern)


def main(argv: list[str]) -> int:
    found = hash_of_files(files(), ROOT)
    if argv == ["--record"]:
        RECORD.write_text(f"{found}\n")
        return 0
    return int(not RECORD.is_file() or RECORD.read_text().strip() != found)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
