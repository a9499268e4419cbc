"""python -m cumo_model data check FILE...: report all problems of conversation files, one per line."""

import os
import sys
from collections.abc import Sequence

from tqdm import tqdm

from cumo_model.data.patterns import record_files
from cumo_model.data.records import checked_rows, picture_names

SHOWN = 5  # lines in a summary


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
        count, pictures, fatal, unlabelled = 0, 0, 0, []
        with tqdm(desc=file, unit=" records", mininterval=1, disable=not sys.stderr.isatty()) as bar:
            for row, problems in checked_rows(file, roots or None, decode, template):
                bar.update(row is not None)
                for problem in problems:
                    bar.clear()
                    print(problem, flush=True)
                bad = any(problem.fatal for problem in problems)
                fatal += bad
                unlabelled += [problem.line for problem in problems if not problem.fatal]
                if row is not None:
                    count = row.number + 1
                    pictures += 0 if bad else len(picture_names(row.value))
        also = f", {len(unlabelled)} have no usable label ({_lines(unlabelled)})" if unlabelled else ""
        print(f"{file}: {_count(count, 'record')}, {fatal} cannot be used{also}", flush=True)
        seen, were = _count(pictures, "picture"), "was" if pictures == 1 else "were"
        if pictures and not roots:
            whose = "its" if pictures == 1 else "their"
            print(f"{file}: {seen} {were} not looked at; --images names {whose} folder", flush=True)
        elif pictures and not decode:
            them = "it" if pictures == 1 else "them"
            print(f"{file}: {seen} {were} found, not decoded; --decode reads {them}", flush=True)
        unusable += fatal
    return unusable


def _lines(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN])) + (", ..." if len(numbers) > SHOWN else "")
    return f"line{'s' if len(numbers) > 1 else ''} {shown}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
