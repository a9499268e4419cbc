"""Ctrl-C and SIGTERM in the command line: no traceback at any moment, exit code 130.

While modules are imported there is nothing to clean up, and an exception there can get lost in a module that
catches it: the process then ends at once. Later both signals raise an exception.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator

STOPPED = 130  # exit code
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal, whose number is the argument: SIGTERM also ends what continues after Ctrl-C.

    After KeyboardInterrupt itself, raised in code that C evaluates, Python would end with SIGINT's own exit
    code even where the exception is caught.
    """


def is_command() -> bool:
    """Whether this process is `python -m cumo_model` or `cumo`, and no program that imports the package."""
    words = sys.orig_argv
    by_name = any(pair == ("-m", "cumo_model") for pair in itertools.pairwise(words))
    return (sys.argv[:1] == ["-m"] and by_name) or os.path.basename(sys.argv[0]) == "cumo"


def end_at_once() -> None:
    """From now on both signals end the process."""
    _set(lambda number, frame: _end())


def end_with(code: int) -> None:
    """From now on both signals end the process with this exit code, because its work is done."""
    _set(lambda number, frame: os._exit(code))


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Inside the `with` block both signals raise an exception, also where Python ignores exceptions."""
    before, hook = {number: signal.getsignal(number) for number in SIGNALS}, sys.unraisablehook

    def again(unraisable):
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            hook(unraisable)
            return
        # an exception in this function would be ignored as well
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()

    _set(_raise)
    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def is_stop(error: BaseException | None) -> bool:
    """Whether an exception is one of the signals, or what a module made of it."""
    seen = []
    while error is not None and error not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def _raise(number: int, frame) -> None:
    raise Stopped(number)


def _end() -> None:
    os.write(2, b"cumo: stopped\n")
    os._exit(STOPPED)


def _set(handler) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # such as in a shell's background job
            signal.signal(number, handler)
