"""pytest in forks of a process that has imported the large packages, so that a run starts in a moment.

Each line of standard input is a JSON list: the arguments of pytest, a file for its output and a limit in
seconds. The answer is a line with the exit code, negative if a signal ended the run, null after the limit.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import time

LARGE = (
    "numpy", "PIL.Image", "torch", "triton", "transformers.trainer", "transformers.modeling_utils",
    "transformers.models.clip.modeling_clip", "transformers.models.mistral.modeling_mistral",
    "transformers.models.mixtral.modeling_mixtral", "peft", "accelerate", "pytest",
)  # fmt: skip


def run(arguments: list[str], output: str, limit_s: float) -> int | None:
    """Run pytest in a fork and end all processes that it leaves."""
    child = os.fork()
    if child == 0:
        os.setsid()
        for target, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, os.open(output, os.O_RDWR))):
            os.dup2(file, target)
        os.dup2(1, 2)
        sys.argv = ["pytest", *arguments]
        code = 3  # of an internal error
        try:
            code = int(importlib.import_module("pytest").main(arguments))
        finally:
            sys.stdout.flush()
            os._exit(code)
    end, ended = time.monotonic() + limit_s, (0, 0)
    while not ended[0] and time.monotonic() < end:
        ended = os.waitpid(child, os.WNOHANG)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended[0]:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(ended[1])


if __name__ == "__main__":
    for name in LARGE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)
