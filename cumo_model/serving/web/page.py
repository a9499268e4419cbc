"""The page: its parts, and what each of them does."""

import html
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import closing
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
from cumo_model.serving.web.uploads import Guard

REFRESH = 0.04  # seconds between two states of an answer in the browser
FILE = 32_000_000  # bytes of an uploaded file
LONGEST = 2048  # tokens that the slider offers
AT_ONCE = 16  # answers being written or waiting for the model
STYLE = """
footer { display: none !important; }
.chat .message, .chat .bot, .chat .user { white-space: pre-wrap; }
.chat button[aria-label="Share"] { display: none; }
#notice { position: fixed; top: 0.6rem; left: 50%; transform: translateX(-50%); z-index: 1000; padding: 0; }
#notice { max-width: 92vw; }
#notice p { margin: 0; padding: 0.4rem 0.8rem; border-left: 3px solid #b91c1c; }
#notice p { background: #fef2f2; color: #7f1d1d; }
"""
FONTS = ("system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")


def question_box() -> gr.MultimodalTextbox:
    """The place for a question and pictures that are uploaded."""
    box = gr.MultimodalTextbox(
        show_label=False,
        placeholder="A question; pictures are uploaded, dropped or pasted here",
        sources=["upload"],
        file_types=["image"],
        file_count="multiple",
        max_plain_text_length=1_000_000,  # longer text would become a file
        elem_id="question",
        autofocus=True,
    )
    kept = box.async_move_resource_to_block_cache

    async def keep(file):
        if str(file).lower().startswith(("http://", "https://")):  # gradio would fetch it
            raise gr.Error("a picture must be uploaded, got an address")
        return await kept(file)

    # a class derived from gradio's would write a file beside this one
    box.async_move_resource_to_block_cache = keep
    return box


def build_page(
    engine: Any,
    folder: Path,
    sampling: Sampling | None = None,
    system: str | None = None,
    name: str | None = None,
) -> tuple[gr.Blocks, Talks]:
    """Build the page.

    Args:
        engine: `Local` or `Endpoint`.
        folder: for pictures; gradio's own folder for files, because it serves no other files.
        sampling: options of generation that the page begins with.
        system: text of the system at the begin of each conversation, or None.
        name: of the model, for the title; by default the engine's.

    Returns:
        The page, and its conversations.
    """
    page = _Page(engine, folder, sampling or Sampling(), system)
    return page.build(name or engine.name), page.talks


def launch(page: gr.Blocks, host: str, port: int, share: bool) -> tuple[str, str | None]:
    """Start the page's server in a thread.

    Returns:
        The page's address, and its public address if it is shared.

    Raises:
        ValueError: there is no public link.
    """
    _, address, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        inbrowser=False,
        inline=False,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        max_file_size=FILE,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(primary_hue="indigo", secondary_hue="indigo", font=FONTS, font_mono=MONO),
        css=STYLE,
        app_kwargs={"middleware": [(Guard, (), {})], "docs_url": None, "redoc_url": None},
    )
    if share and not public:
        raise ValueError("share must reach gradio's server for public links, which cannot be reached")
    return address, public


class _Page:
    def __init__(self, engine, folder: Path, sampling: Sampling, system: str | None):
        self.engine, self.sampling, self.system, self.folder = engine, sampling, system, folder
        self.talks = Talks(folder)

    def build(self, name: str) -> gr.Blocks:
        with gr.Blocks(title=f"CuMo: {name}", analytics_enabled=False, fill_height=True) as page:
            gr.HTML(f"<h2 style='margin: 0'>CuMo: {html.escape(name)}</h2>")
            with gr.Tabs():
                with gr.Tab("Chat"):
                    self._chat()
                with gr.Tab("Routing") as tab:
                    self._routing(tab)
            page.unload(self._leave)
        return page

    def _chat(self) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=4):
                self.chat = gr.Chatbot(
                    show_label=False,
                    elem_classes="chat",
                    height="max(300px, calc(100vh - 320px))",
                    buttons=["copy", "copy_all"],
                    render_markdown=False,  # an answer is text: it must not load pictures or hide its marks
                    placeholder="Ask about one or several pictures, or about anything.",
                    feedback_options=None,
                    group_consecutive_messages=False,
                )
                self.notice = gr.HTML("", elem_id="notice", container=False, visible=False)
                self.question = question_box()
                with gr.Row():
                    stop = gr.Button("Stop", elem_id="stop")
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
                        elem_id="temperature",
                    ),
                    gr.Slider(
                        min(0.05, given.top_p),
                        1,
                        given.top_p,
                        step=0.01,
                        label="Top-p",
                        elem_id="top_p",
                    ),
                    gr.Slider(
                        1,
                        max(LONGEST, given.max_new_tokens),
                        given.max_new_tokens,
                        step=1,
                        label="Longest answer",
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
        gr.on([clear.click, self.chat.clear], self._clear, self.question, seen, **at_once)

    def _routing(self, tab) -> None:
        if reason := why_none(self.engine):
            gr.HTML(f"<p id='no_routing'>{html.escape(reason)}</p>")
            return
        self.told = gr.HTML("", elem_id="told", container=False, visible=False)
        self.choice = gr.Dropdown([], label="Picture", elem_id="choice", interactive=True, visible=False)
        headings = (
            "Its patches, coloured by the expert that each chooses first",
            "Share of each expert, of all tokens of the picture and its question",
        )
        kwargs = {
            "type": "filepath",
            "format": "png",
            "show_label": False,
            "buttons": ["download", "fullscreen"],
        }
        self.groups, pictures = [], []
        for heading, name in zip(headings, ("patches", "load"), strict=True):
            with gr.Column(visible=False) as group:
                gr.HTML(f"<h3 style='margin: 0'>{heading}</h3>", container=False)
                pictures.append(gr.Image(elem_id=name, **kwargs))
            self.groups.append(group)
        drawn = [self.told, *self.groups, *pictures]
        one = {"concurrency_limit": 1, "concurrency_id": "routing", "api_visibility": "private"}
        tab.select(self._choices, None, [self.choice, *drawn], **one)
        self.choice.input(self._draw, self.choice, drawn, **one)

    def _ask(self, asked: dict | None, temperature, top_p, longest, request: gr.Request) -> Iterator:
        asked = {"text": "", "files": [], **(asked or {})}
        talk = self.talks.of(request.session_hash)
        sampling = self._sampling(temperature, top_p, longest)
        steps = talk.ask(self.engine, asked["text"], asked["files"], sampling, self.system)
        talk.uploads.update(asked["files"])
        is_given_back = False
        try:
            is_given_back = not (yield from self._shown(talk, steps, asked))
        finally:  # also if the page was closed; the conversation has its own copy
            for file in [] if is_given_back else asked["files"]:
                Path(file).unlink(missing_ok=True)
                talk.uploads.discard(file)

    def _again(self, temperature, top_p, longest, request: gr.Request) -> Iterator:
        talk = self.talks.of(request.session_hash)
        steps = talk.ask_again(self.engine, self._sampling(temperature, top_p, longest), self.system)
        yield from self._shown(talk, steps)

    def _sampling(self, temperature, top_p, longest) -> Sampling:
        return Sampling(int(longest), float(temperature), float(top_p), self.sampling.seed)

    def _shown(self, talk: Talk, steps: Iterator, asked: dict | None = None) -> Iterator:
        """States of chat, question and notice while an answer is written; returns whether there is one.

        The question is given back to its box if there is no answer."""
        last = sent = None
        with closing(steps):
            try:
                for _ in steps:
                    if last is not None and time.monotonic() - last <= REFRESH:
                        continue  # there is another step soon
                    rows = _rows(talk)
                    if last is None:
                        yield rows, None if asked else gr.skip(), _notice("")
                    elif rows != sent:  # a notice may have come from another button
                        yield rows, gr.skip(), gr.skip()
                    last, sent = time.monotonic(), rows
            except ValueError as error:
                back = gr.skip() if last is None or asked is None else asked
                yield _rows(talk), back, _notice(str(error))
                return False
        yield _rows(talk), gr.skip(), _notice("")
        return True

    def _stop(self, request: gr.Request) -> None:
        self.talks.of(request.session_hash).stop()

    def _clear(self, asked: dict | None, request: gr.Request):
        self.talks.of(request.session_hash).clear()
        for file in (asked or {}).get("files", []):
            Path(file).unlink(missing_ok=True)
        return [], None, _notice("")

    def _leave(self, request: gr.Request) -> None:
        self.talks.end(request.session_hash)
        self.talks.sweep()

    def _choices(self, request: gr.Request):
        """Choices of pictures, and the routing of the last one."""
        number = len(self.talks.of(request.session_hash).pictures())
        choices = [(f"picture {i}", i - 1) for i in range(1, number + 1)]
        choice = gr.Dropdown(choices, value=number - 1 if number else None, visible=number > 0)
        return choice, *self._draw(number - 1, request)

    def _draw(self, number: int | None, request: gr.Request):
        talk = self.talks.of(request.session_hash)
        pictures = talk.pictures()
        if number is None or not 0 <= number < len(pictures):
            return _drawn("Ask a question about a picture in the tab Chat first.")
        path, question = pictures[number]
        files = [talk.folder / f"{secrets.token_hex(16)}.png" for _ in range(2)]
        try:
            has_patches = draw_routing(self.engine, path, question, *files)
        except ValueError as error:
            return _drawn(str(error))
        if not has_patches:
            return _drawn("No expert of this model sees patches of pictures.", None, files[1])
        return _drawn("", *files)


def _drawn(told: str, *files: Path | None) -> tuple:
    """The state of the tab of routing: a line to the user, and files of pictures."""
    found = [*files, None, None][:2]
    shown = [gr.Column(visible=file is not None) for file in found]
    return _notice(told), *shown, *[file and str(file) for file in found]


def _notice(told: str) -> gr.HTML:
    """A line to the user, if there is something to tell."""
    return gr.HTML(f"<p>{html.escape(' '.join(told.split()))}</p>" if told else "", visible=bool(told))


def _as_text(text: str) -> str:
    """Text that gradio's chat shows as it is: it takes HTML for HTML, also without Markdown."""
    return re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")


def _rows(talk: Talk) -> list[dict]:
    """The rows of the chat."""
    rows = []
    for turn in talk.shown():
        pictures = [{"path": path} for path in pictures_of(turn.question)]
        text = {"type": "text", "text": _as_text(text_of(turn.question))}
        rows.append({"role": "user", "content": [*pictures, text]})
        answer = [{"type": "text", "text": _as_text(turn.answer) or ("" if turn.note else "…")}]
        answer += [{"type": "text", "text": f"[{turn.note}]"}] * bool(turn.note)
        rows.append({"role": "assistant", "content": answer})
    return rows
