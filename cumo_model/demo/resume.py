"""The end of a demo that is stopped: one line with the command that resumes it."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable


def command(*words: object) -> str:
    """A command line of this project, with the Python that runs now."""
    here = os.path.relpath(sys.executable)
    found = shutil.which("python")
    if found and os.path.samefile(found, sys.executable):
        python = "python"
    else:
        python = sys.executable if here.startswith("..") else here
    return shlex.join([python, "-m", "cumo_model", *map(str, words)])


def resumable(run: Callable[[], int], *words: object) -> int:
    """Call `run`. If it is stopped by a signal, print the command that resumes it.

    Args:
        run: function that returns an exit code.
        *words: arguments of `python -m cumo_model` with which the user started it.

    Returns:
        The exit code, 130 if it was stopped.
    """
    try:
        return run()
    except KeyboardInterrupt:
        said = "stopped"
    except Exception as error:
        if type(error).__name__ != "Interrupted":  # its module imports torch
            raise
        said = str(error)
    print(f"cumo: {said}; to resume: {command(*words)}", file=sys.stderr)
    return 130
