"""Files of a tokenizer in the folder of a model, looked for without importing torch."""

import os
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Whether a folder contains the files of a tokenizer."""
    return any(Path(folder, name).is_file() for name in TOKENIZER_FILES)


def no_tokenizer(folder: str | os.PathLike) -> str:
    """What a message says of a folder that has no tokenizer: the fact, and what to do."""
    return (
        f"has no tokenizer ({' or '.join(TOKENIZER_FILES)}): copy the tokenizer files of its language model "
        f"into {os.fspath(folder)!r}"
    )
