"""The page's server, the command `python -m cumo_model chat --web`."""

import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from cumo_model.serving.sampling import Sampling

FILE = 32_000_000  # bytes of an uploaded file
WHERE = "GRADIO_TEMP_DIR"


def web(
    engine: Any,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    sampling: Sampling | None = None,
    system: str | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the page until the process is stopped.

    Args:
        engine: `Local` or `Endpoint`.
        host: address to listen at; by default this machine's own, which no other machine reaches.
        port: TCP port; 0 for any that is free.
        share: also open gradio's public link to the page. Everybody who knows it can use the page.
        sampling: options of generation that the page begins with.
        system: text of the system at the begin of each conversation, or None.
        ready: called with the page's address when it can be opened; by default the address is printed.

    Raises:
        ValueError: the package gradio is missing, or the server cannot listen.
    """
    port = _free(host, port)
    before, folder = os.environ.get(WHERE), tempfile.mkdtemp(prefix="cumo-web-")
    os.environ[WHERE] = folder
    page = talks = None
    try:
        from starlette.middleware import Middleware

        from cumo_model.serving.web.page import STYLE, build_page, theme
        from cumo_model.serving.web.uploads import Guard

        page, talks = build_page(engine, folder, sampling, system)
        _, address, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            inbrowser=False,
            inline=False,
            show_error=True,
            footer_links=[],
            run_history=False,
            allowed_paths=[],
            max_file_size=FILE,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            theme=theme(),
            css=STYLE,
            app_kwargs={"middleware": [Middleware(Guard)], "docs_url": None, "redoc_url": None},
        )
        if share and not public:
            raise ValueError("share must reach gradio's server for public links, which cannot be reached")
        if ready is not None:
            ready(address)
        else:
            print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
        threading.Event().wait()
    finally:
        if talks is not None:
            talks.end_all()
        if page is not None and page.is_running:
            page.close(verbose=False)
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop(WHERE) if before is None else os.environ.update({WHERE: before})


def _free(host: str, port: int) -> int:
    """The port, or a free one for 0, after a test that the server can listen there."""
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
