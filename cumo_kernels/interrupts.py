"""Ctrl-C and SIGTERM in the commands of this package: one line and exit code 130, no traceback.

While modules are imported nothing has to be cleaned up, and an exception could get lost in one that catches
it: the process then ends at once. Later both signals raise Stopped.

cumo_model has its own, `signals`: it is needed before torch, which `import cumo_kernels` loads.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

STOPPED = 130  # exit code
GRACE = 5.0  # seconds that a command has to clean up
COMMANDS = {"cumo_kernels": "cumo-kernels", "benchmarks": "bench"}  # module -> name in messages
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM. After KeyboardInterrupt itself, raised in code that C evaluates, Python would end
    with SIGINT's own exit code even where the exception is caught.
    """


def program() -> str | None:
    """The name of the command that this process is; None in a program that imports the package."""
    for option, module in itertools.pairwise(sys.orig_argv):
        if option == "-m":
            return COMMANDS.get(module)
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return name if name in COMMANDS.values() else None


def end_at_once() -> None:
    """From now on both signals end the process."""
    _set(lambda number, frame: _end())


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Inside the `with` block both signals raise KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, hook = {number: signal.getsignal(number) for number in SIGNALS}, sys.unraisablehook
    ends = []

    def stop(number: int, frame) -> None:
        # an import that catches the exception would go on as if there had been no signal
        ends.append(threading.Timer(GRACE, _end))
        ends[-1].daemon = True
        ends[-1].start()
        raise Stopped

    def again(unraisable) -> None:
        """Python ignores exceptions in destructors, and would ignore one of this function."""
        if not isinstance(unraisable.exc_value, Stopped):
            hook(unraisable)
            return
        ends.append(threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)))
        ends[-1].start()

    _set(stop)
    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for end in ends:
            end.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def stoppable(command: Callable[[], int]) -> int:
    """Call a command -> its exit code, or 130 and a line if a signal has stopped it."""
    try:
        with raising():
            return command()
    except KeyboardInterrupt:
        _say()
        return STOPPED


def _say() -> None:
    if "--quiet" not in sys.argv and "--serve" not in sys.argv:  # processes of a command that says it
        os.write(2, f"{program() or 'cumo-kernels'}: stopped\n".encode())


def _end() -> None:
    _say()
    os._exit(STOPPED)


def _set(handler) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # such as in a shell's background job
            signal.signal(number, handler)
