"""python -m cumo_model data check FILE...: report all problems of conversation files, one per line."""

import os
import sys
from collections.abc import Sequence

from tqdm import tqdm

from cumo_model.data.records import check, record_files


def check_files(
    files: Sequence[str | os.PathLike],
    image_root: Sequence[str] | None = None,
    decode: bool = False,
    template: str = "mistral_instruct_system",
) -> int:
    """Print each problem and a summary of each file.

    Args:
        files: names or patterns of conversation files.
        image_root: folders or .tar files of the pictures; None: only those of a .tar shard are checked.
        decode: also decode each picture.
        template: as in `records.check`.

    Returns:
        Number of records that cannot be used; a file that cannot be read counts as one.
    """
    unusable, found = 0, []
    for pattern in files:
        try:
            found += [file for file in record_files(pattern) if file not in found]
        except ValueError as error:
            print(error, flush=True)
            unusable += 1
    for file in found:
        roots = list(image_root or []) + ([file] if file.endswith(".tar") else [])
        count, fatal, warned = [0], 0, 0
        with tqdm(desc=file, unit=" records", mininterval=1, disable=not sys.stderr.isatty()) as bar:
            for problem in check(file, roots or None, decode, count, template):
                bar.update(count[0] - bar.n)
                bar.clear()
                print(problem, flush=True)
                fatal, warned = fatal + problem.fatal, warned + (not problem.fatal)
        also = f", {warned} have no usable label" if warned else ""
        print(f"{file}: {count[0]} records, {fatal} cannot be used{also}", flush=True)
        unusable += fatal
    return unusable
