"""Whether `make test-all` has passed on the kernels as they are.

    python -m tests.swept                  ends with 0 if it has, with 1 if not
    python -m tests.swept --print          the hash of the files that decide it
    python -m tests.swept --record HASH    says that it has passed, if that is still their hash

`make test-all` takes the hash before it begins and, where all of it passed, records it in tests/swept.txt:
commit that file.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from cumo_kernels.extension import hash_of_files

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_suffix(".txt")
DECIDE = (
    "csrc/*", "cumo_kernels/**/*.py", "cumo_kernels/tiles/configs/*.json", "benchmarks/**/*.py",
    "tests/kernels/*.py",
    "tests/benchmarks/test_gpu_rehearsal.py", "tests/conftest.py", "tests/rounding.py", "constraints.txt",
    "pyproject.toml", "setup.py",
)  # fmt: skip
# what makes a run another one than `make test-all` of this tree
SWITCHES = ("PYTEST_ADDOPTS", "CUMO_BACKEND", "CUMO_BATCH_INVARIANT", "CUMO_EMULATE", "TRITON_INTERPRET")


def files() -> Iterator[Path]:
    for pattern in DECIDE:
        yield from ROOT.glob(pattern)


def main(argv: list[str]) -> int:
    found = hash_of_files(files(), ROOT)
    if argv == ["--print"]:
        print(found)
        return 0
    if argv[:1] == ["--record"]:
        switched = [name for name in SWITCHES if os.environ.get(name)]
        if argv[1:] != [found] or switched:
            print(f"not recorded: {', '.join(switched) or 'files changed on the way'}", file=sys.stderr)
            return 1
        RECORD.write_text(f"{found}\n")
        return 0
    return int(not RECORD.is_file() or RECORD.read_text().strip() != found)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
