"""The page's server, the command `python -m cumo_model chat --web`."""

import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cumo_model.serving.engines import open_engine
from cumo_model.serving.messages import text_problem
from cumo_model.serving.sampling import Sampling
from cumo_model.serving.web.talk import Talks

WHERE = "GRADIO_TEMP_DIR"


def serve_page(
    checkpoint: str | os.PathLike | None = None,
    endpoint: str | None = None,
    template: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    bits: int | None = None,
    sampling: Sampling | None = None,
    system: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
) -> None:
    """Serve the page until the process is stopped.

    Args:
        checkpoint: as in `open_engine`.
        endpoint: as in `open_engine`.
        template: as in `open_engine`.
        device: as in `open_engine`.
        dtype: as in `open_engine`.
        bits: as in `open_engine`.
        sampling: as in `served`.
        system: as in `served`.
        host: as in `served`.
        port: as in `served`.
        share: as in `served`.

    Raises:
        ValueError: as `open_engine` and `served`.
    """
    import cumo_model.serving.web.page  # noqa: F401  a missing gradio is told before the weights are loaded

    _free(host, port)
    engine = open_engine(checkpoint, endpoint, template, device, dtype, bits)
    name = engine.name if checkpoint is None else Path(checkpoint).resolve().name
    with served(engine, host, port, share, sampling, system, name) as site:
        print(f"open {site.address} in a browser; Ctrl-C ends it", flush=True)
        if site.public:
            print(f"everybody who knows it can use {site.public}", flush=True)
        threading.Event().wait()


@dataclass(frozen=True)
class Site:
    """A served page.

    Attributes:
        address: of the page.
        public: its public address, or None.
        folder: with all of its files, deleted at the end.
        talks: its conversations.
    """

    address: str
    public: str | None
    folder: Path
    talks: Talks


@contextmanager
def served(
    engine: Any,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    sampling: Sampling | None = None,
    system: str | None = None,
    name: str | None = None,
) -> Iterator[Site]:
    """Serve the page inside the `with` block.

    Args:
        engine: `Local` or `Endpoint`.
        host: address to listen at; by default this machine's own, which no other machine reaches.
        port: TCP port; 0 for any that is free.
        share: also open gradio's public link to the page. Everybody who knows it can use the page.
        sampling: options of generation that the page begins with.
        system: text of the system at the begin of each conversation, or None.
        name: of the model, for the title; by default the engine's.

    Raises:
        ValueError: the package gradio is missing, the system text cannot be used, or the server cannot
            listen.
    """
    if system is not None and (reason := text_problem(system, engine.template)):
        raise ValueError(f"system {reason}")
    port = _free(host, port)
    before, folder = os.environ.get(WHERE), tempfile.mkdtemp(prefix="cumo-web-")
    os.environ[WHERE] = folder  # gradio keeps uploads there
    page = talks = None
    try:
        from cumo_model.serving.web.page import build_page, launch

        page, talks = build_page(engine, Path(folder), sampling, system, name)
        address, public = launch(page, host, port, share)
        yield Site(address, public, Path(folder), talks)
    finally:
        if talks is not None:
            talks.end_all()
        shutil.rmtree(folder, ignore_errors=True)  # also here, because the next line can take seconds
        if page is not None and page.is_running:
            page.close(verbose=False)
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop(WHERE) if before is None else os.environ.update({WHERE: before})


def _free(host: str, port: int) -> int:
    """The port, or a free one for 0, after a test that the server can listen there."""
    if not 0 <= port < 2**16:  # the resolver would take the lower bits
        raise ValueError(f"port must be from 0 to {2**16 - 1}, got {port}")
    try:
        where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(where[0], where[1]) as probe:
            if sys.platform != "win32":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where[4])
            return probe.getsockname()[1]
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"host and port must be free to listen at, got {host}:{port}: {reason}") from None
