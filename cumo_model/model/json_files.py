"""JSON files that contain an object, such as config.json, read without importing torch."""

import json
import os
from pathlib import Path
from typing import Any


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        ValueError: the file is missing or damaged, or contains no object; the message names it.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, got {type(values).__name__}")
    return values
