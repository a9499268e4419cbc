"""Parquet files and spreadsheets, with packages that only some benchmarks need."""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CELL = 32_767  # characters: the most that a cell of a spreadsheet holds


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a parquet file, with its place for messages.

    Args:
        path: the file.
        columns: names of the columns to read; those that the file does not have are left out.

    Raises:
        ValueError: pyarrow is missing, or the file cannot be read.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} needs the package pyarrow: pip install 'cumo[eval]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = [name for name in columns if name in file.schema_arrow.names]
            rows = file.read(columns=names).to_pylist()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or ' '.join(str(error).split())}") from None
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} must be a parquet file: {' '.join(str(error).split())}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def write_sheet(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str | int]]) -> None:
    """Write a spreadsheet (.xlsx) atomically.

    Texts stay texts also where they begin with "=". What XML cannot hold, such as control characters and lone
    surrogates, becomes U+FFFD.

    Args:
        path: the file.
        columns: the texts of its first row.
        rows: the others.

    Raises:
        ValueError: openpyxl is missing, or a text is longer than a cell can be; the row is named.
    """
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError:
        raise ValueError(f"{path} needs the package openpyxl: pip install 'cumo[eval]'") from None
    book = Workbook()
    sheet = book.active
    for number, row in enumerate([columns, *rows], 1):
        for place, value in enumerate(row, 1):
            if isinstance(value, str):
                value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                value = ILLEGAL_CHARACTERS_RE.sub("\ufffd", value)
                if len(value) > CELL:
                    raise ValueError(
                        f"{path}, row {number}: a cell must have at most {CELL} characters, got {len(value)}"
                    )
            if value != "":
                cell = sheet.cell(number, place, value)
                cell.data_type = "s" if isinstance(value, str) else cell.data_type
    content = io.BytesIO()
    book.save(content)
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.getvalue())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
