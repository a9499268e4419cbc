"""The folder of a run: names of its files, its checkpoints, and the step at which it has finished."""

import json
import os
import re
from pathlib import Path

RECIPE_FILE = "recipe.json"  # identity of the recipe, and the fields of the Trainer that change the result
DATA_FILE = "data.json"  # identity of the data
START_FILE = "start.json"  # fingerprints of the models it starts from
RESULT = "model"  # subfolder of a finished run, with its own RECIPE_FILE, the whole recipe
HISTORY_FILE = "trainer_state.json"  # file in RESULT and in each checkpoint, as the Trainer calls it


def is_first_process() -> bool:
    """Whether this is the first process of a run; known before the processes have joined."""
    return int(os.environ.get("RANK", 0)) == 0


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = {}
    for path in Path(folder).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and (path / HISTORY_FILE).is_file():
            found[int(number[1])] = path
    return [found[step] for step in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was saved."""
    return int(checkpoint.name.split("-")[1])


def has_begun(folder: str | os.PathLike) -> bool:
    """Whether a run has a checkpoint or a result. Without both, its folder is free for any recipe."""
    return bool(checkpoints(folder)) or Path(folder, RESULT).is_dir()


def finished_step(folder: str | os.PathLike) -> int | None:
    """The number of steps of a run's result, or None if the run has no result that says so."""
    try:
        return int(json.loads(Path(folder, RESULT, HISTORY_FILE).read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
