"""The page: its parts, and what each of them does."""

import html
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it is read when gradio is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

try:
    import gradio as gr
except ImportError:
    raise ValueError("a page needs the package gradio: pip install 'cumo[web]'") from None

from cumo_model.serving.messages import pictures_of, text_of
from cumo_model.serving.sampling import Sampling
from cumo_model.serving.web.routing import draw_routing, why_none
from cumo_model.serving.web.talk import Talk, Talks

REFRESH = 0.04  # seconds between two states of an answer in the browser
LONGEST = 2048  # tokens that the slider offers
AT_ONCE = 16  # answers being written or waiting for the model
STYLE = """
footer { display: none !important; }
.notice { min-height: 1.5rem; color: var(--error-text-color); font-size: var(--text-md); }
.lead { color: var(--body-text-color-subdued); }
.chat .message, .chat .bot, .chat .user { white-space: pre-wrap; }
"""
FONTS = ("system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")

from gradio.events import Dependency

class Question(gr.MultimodalTextbox):
    """A question with pictures that are uploaded: an address is not fetched."""

    is_template = True  # of gradio: it is drawn as the class that it is derived from

    async def async_move_resource_to_block_cache(self, url_or_file_path):
        if str(url_or_file_path).lower().startswith(("http://", "https://")):
            raise gr.Error("a picture must be uploaded, got an address")
        return await super().async_move_resource_to_block_cache(url_or_file_path)
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


def theme() -> gr.themes.Base:
    """The look of the page, with fonts of the reader's system."""
    return gr.themes.Default(primary_hue="indigo", secondary_hue="indigo", font=FONTS, font_mono=MONO)


def build_page(
    engine: Any,
    folder: str | os.PathLike,
    sampling: Sampling | None = None,
    system: str | None = None,
) -> tuple[gr.Blocks, Talks]:
    """Build the page.

    Args:
        engine: `Local` or `Endpoint`.
        folder: for pictures, which must be gradio's own folder for files.
        sampling: options of generation that the page begins with.
        system: text of the system at the begin of each conversation, or None.

    Returns:
        The page, and its conversations.
    """
    return _Page(engine, Path(folder), sampling or Sampling(), system).build()


class _Page:
    def __init__(self, engine, folder: Path, sampling: Sampling, system: str | None):
        self.engine, self.sampling, self.system, self.folder = engine, sampling, system, folder
        self.talks = Talks(folder)

    def build(self) -> tuple[gr.Blocks, Talks]:
        with gr.Blocks(title=f"CuMo: {self.engine.name}", analytics_enabled=False, fill_height=True) as page:
            gr.HTML(f"<h2>CuMo</h2><div class='lead'>{html.escape(self.engine.name)}</div>")
            with gr.Tabs():
                with gr.Tab("Chat"):
                    self._chat()
                with gr.Tab("Routing") as tab:
                    self._routing(tab)
            page.unload(self._leave)
        return page, self.talks

    def _chat(self) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=4):
                self.chat = gr.Chatbot(
                    show_label=False,
                    elem_classes="chat",
                    height="60vh",
                    buttons=["copy", "copy_all"],
                    render_markdown=False,  # an answer is text: it must not load pictures or hide its marks
                    placeholder="Ask about one or several pictures, or about anything.",
                    feedback_options=None,
                    group_consecutive_messages=False,
                )
                self.notice = gr.HTML("", elem_classes="notice", elem_id="notice", container=False)
                self.question = Question(
                    show_label=False,
                    placeholder="A question; pictures are uploaded, dropped or pasted here",
                    sources=["upload"],
                    file_types=["image"],
                    file_count="multiple",
                    max_plain_text_length=1_000_000,  # longer text would become a file
                    elem_id="question",
                    autofocus=True,
                )
                with gr.Row():
                    stop = gr.Button("Stop", variant="stop", elem_id="stop")
                    again = gr.Button("Regenerate", elem_id="again")
                    clear = gr.Button("Clear", elem_id="clear")
            with gr.Column(scale=1, min_width=220):
                given = self.sampling
                options = [
                    gr.Slider(
                        0,
                        max(2.0, given.temperature),
                        given.temperature,
                        step=0.05,
                        label="Temperature",
                        info="0: always the likeliest token",
                        elem_id="temperature",
                    ),
                    gr.Slider(
                        min(0.05, given.top_p),
                        1,
                        given.top_p,
                        step=0.01,
                        label="Top-p",
                        info="sample from the likeliest tokens of this share",
                        elem_id="top_p",
                    ),
                    gr.Slider(
                        1,
                        max(LONGEST, given.max_new_tokens),
                        given.max_new_tokens,
                        step=1,
                        label="Longest answer",
                        info="in tokens",
                        elem_id="longest",
                    ),
                ]
        seen = [self.chat, self.question, self.notice]
        answering = {"concurrency_limit": AT_ONCE, "concurrency_id": "answers", "show_progress": "hidden"}
        private = {"api_visibility": "private"}
        self.question.submit(self._ask, [self.question, *options], seen, **answering, **private)
        again.click(self._again, options, seen, **answering, **private)
        at_once = {"concurrency_limit": None, "show_progress": "hidden", "queue": False, **private}
        stop.click(self._stop, None, None, **at_once)
        clear.click(self._clear, None, seen, **at_once)

    def _routing(self, tab) -> None:
        if reason := why_none(self.engine):
            gr.HTML(f"<p id='no_routing'>{html.escape(reason)}</p>")
            return
        self.told = gr.HTML("", elem_id="told", container=False)
        self.choice = gr.Dropdown([], label="Picture", elem_id="choice", interactive=True, visible=False)
        kwargs = {"format": "png", "buttons": ["download", "fullscreen"], "visible": False, "type": "filepath"}
        patches = gr.Image(label="Patches by their first-choice expert", elem_id="patches", **kwargs)
        load = gr.Image(
            label="Share of the tokens of picture and question that each expert gets", elem_id="load", **kwargs
        )
        drawn = [self.told, patches, load]
        one = {"concurrency_limit": 1, "concurrency_id": "routing", "api_visibility": "private"}
        tab.select(self._choices, None, [self.choice, *drawn], **one)
        self.choice.input(self._draw, self.choice, drawn, **one)

    def _ask(self, asked: dict, temperature, top_p, longest, request: gr.Request) -> Iterator:
        talk = self.talks.of(request.session_hash)
        steps = lambda: talk.ask(
            self.engine,
            (asked or {}).get("text") or "",
            (asked or {}).get("files") or [],
            Sampling(int(longest), float(temperature), float(top_p), self.sampling.seed),
            self.system,
        )
        yield from self._shown(talk, steps, is_new=True)
        for file in (asked or {}).get("files") or []:
            if talk.turns:  # as it has its own copy
                Path(file).unlink(missing_ok=True)

    def _again(self, temperature, top_p, longest, request: gr.Request) -> Iterator:
        talk = self.talks.of(request.session_hash)
        steps = lambda: talk.ask_again(
            self.engine,
            Sampling(int(longest), float(temperature), float(top_p), self.sampling.seed),
            self.system,
        )
        yield from self._shown(talk, steps, is_new=False)

    def _shown(self, talk: Talk, steps, is_new: bool) -> Iterator:
        """States of chat, question and notice while an answer is written."""
        last = -REFRESH
        try:
            for number, _ in enumerate(steps()):
                emptied = None if is_new and not number else gr.skip()
                if not number or time.monotonic() - last > REFRESH:
                    last = time.monotonic()
                    yield _rows(talk), emptied, ""
        except ValueError as error:
            yield _rows(talk), gr.skip(), _told(error)
            return
        yield _rows(talk), gr.skip(), ""

    def _stop(self, request: gr.Request) -> None:
        self.talks.of(request.session_hash).stop()

    def _clear(self, request: gr.Request):
        self.talks.of(request.session_hash).clear()
        return [], None, ""

    def _leave(self, request: gr.Request) -> None:
        self.talks.end(request.session_hash)

    def _choices(self, request: gr.Request):
        """Choices of pictures, and the routing of the last one."""
        number = len(self.talks.of(request.session_hash).pictures())
        choices = [(f"picture {i}", i - 1) for i in range(1, number + 1)]
        choice = gr.Dropdown(choices, value=number - 1 if number else None, visible=number > 0)
        return choice, *self._draw(number - 1, request)

    def _draw(self, number: int | None, request: gr.Request):
        talk = self.talks.of(request.session_hash)
        pictures, nothing = talk.pictures(), gr.Image(None, visible=False)
        if number is None or not 0 <= number < len(pictures):
            return "<p>Ask a question about a picture in the tab Chat first.</p>", nothing, nothing
        path, question = pictures[number]
        names = [talk.folder / f"{secrets.token_hex(16)}.png" for _ in range(2)]
        try:
            has_patches = draw_routing(self.engine, path, question, *names)
        except ValueError as error:
            return _told(error), nothing, nothing
        told = "" if has_patches else "<p>No expert of this model sees patches of pictures.</p>"
        shown = gr.Image(str(names[0]), visible=True) if has_patches else nothing
        return told, shown, gr.Image(str(names[1]), visible=True)


def _told(error: Exception) -> str:
    """An error as one line of the page."""
    return f"<p>{html.escape(' '.join(str(error).split()))}</p>"


def _rows(talk: Talk) -> list[dict]:
    """The rows of the chat."""
    rows = []
    for turn in talk.shown():
        pictures = [{"path": path} for path in pictures_of(turn.question)]
        text = {"type": "text", "text": text_of(turn.question)}
        rows.append({"role": "user", "content": [*pictures, text]})
        answer = [{"type": "text", "text": turn.answer or ("" if turn.note else "…")}]
        answer += [{"type": "text", "text": f"[{turn.note}]"}] * bool(turn.note)
        rows.append({"role": "assistant", "content": answer})
    return rows