"""Chat in the terminal about pictures, the command `python -m cumo_model chat`."""

import os
import shlex
import signal
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cumo_model.checkpoints.folders import write_json
from cumo_model.processing.pictures import load_image
from cumo_model.serving.engines import Engine, open_engine
from cumo_model.serving.local import BrokenModelError
from cumo_model.serving.messages import Message, pictures_of, text_of, text_problem, user_message
from cumo_model.serving.replies import CANCELLED, Reply
from cumo_model.serving.sampling import GREEDY, Sampling

HELP = """\
/image FILE  show a picture, a file or URL, with the next question; may be repeated
/reset       forget the conversation and its pictures
/undo        forget the last question and its answer
/save FILE   write the conversation as JSON to a new file
/help        this list
/quit        end, as do an empty line and Ctrl-D
Ctrl-C ends an answer; what was printed of it stays in the conversation."""
STOPPED = "the answer was stopped; Ctrl-C again, or an empty line, ends the conversation"
EMPTY = "the answer is empty"


class Conversation:
    """A conversation with an engine.

    Attributes:
        messages: questions and answers so far, after the system text if there is one.
        shown: (name, picture) of the pictures that come with the next question.
    """

    def __init__(self, engine: Engine, sampling: Sampling = GREEDY, system: str | None = None):
        if system is not None and (reason := text_problem(system, engine.template)):
            raise ValueError(f"system {reason}")
        self._engine, self._sampling, self._system = engine, sampling, system
        self._names: dict[int, str] = {}  # of pictures, by identity: for `save`
        self.reset()

    def reset(self) -> None:
        """Forget all messages and pictures."""
        self.messages: list[Message] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self.shown: list[tuple[str, Image.Image]] = []

    def undo(self) -> bool:
        """Forget the last question and its answer; False if there is none."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return False
        del self.messages[-2:]
        return True

    def show(self, source: Any, picture: Image.Image | None = None) -> None:
        """Show a picture, as `load_image` reads it, with the next question."""
        picture = load_image(source) if picture is None else picture
        self.shown.append((str(source), picture))

    def ask(self, text: str) -> Reply:
        """Print the answer to a question as it is generated, and keep both in the conversation.

        An answer that is stopped by Ctrl-C is kept as far as it was printed; if nothing was, the question is
        not kept either.

        Raises:
            ValueError: the question cannot be asked or answered; the conversation is unchanged.
            KeyboardInterrupt: SIGTERM came.
        """
        if reason := text_problem(text, self._engine.template):
            raise ValueError(f"the question {reason}")
        question = user_message(text, [picture for _, picture in self.shown])
        reply = Reply("", CANCELLED)
        try:
            with self._engine.stream([*self.messages, question], self._sampling) as pieces:
                try:
                    for piece in pieces:
                        print(_printable(piece), end="", flush=True)
                finally:
                    print(flush=True)
                    reply = pieces.reply
        except KeyboardInterrupt as stop:  # also while the pictures are prepared
            if signal.SIGTERM in stop.args or self._is_single:
                raise
        if reply.text or reply.finish != CANCELLED:
            self._names |= {id(picture): name for name, picture in self.shown}
            self.messages += [question, {"role": "assistant", "content": reply.text}]
            self.shown = []
        return reply

    _is_single = False  # whether Ctrl-C ends more than the answer

    def save(self, path: str | os.PathLike) -> None:
        """Write the messages as JSON, pictures by their names.

        Raises:
            ValueError: there is no message yet, or the file exists or cannot be written.
        """
        path = Path(path).expanduser()
        if not any(message["role"] == "user" for message in self.messages):
            raise ValueError("there is nothing to save: no question has been answered")
        if os.path.lexists(path):
            raise ValueError(f"{str(path)!r} exists already")
        said = [
            {
                "role": message["role"],
                **(
                    {"images": [self._names[id(p)] for p in shown]} if (shown := pictures_of(message)) else {}
                ),
                "text": text_of(message),
            }
            for message in self.messages
        ]
        try:
            write_json(path, {"model": self._engine.name, "messages": said})
        except OSError as error:
            raise ValueError(f"{str(path)!r} cannot be written: {error.strerror}") from None


def chat(
    checkpoint: str | os.PathLike | None = None,
    images: Sequence[Any] = (),
    question: str | None = None,
    template: str | None = None,
    sampling: Sampling = GREEDY,
    *,
    system: str | None = None,
    endpoint: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    bits: int | None = None,
) -> None:
    """Answer one question, or questions from standard input until an empty line, as one conversation.

    Ctrl-C in an answer to a question from standard input stops the answer; what was printed of it stays in
    the conversation. Anywhere else it ends the conversation. A line that begins with / is a command, see
    HELP.

    Args:
        checkpoint: folder of the checkpoint; give either this or `endpoint`.
        images: pictures as in `load_image`, such as paths or URLs, for the first question.
        question: the question; None: read questions from standard input.
        template: name of an instruct template; by default that of the checkpoint's processor.
        sampling: options of generation.
        system: text that replaces the system text of the template.
        endpoint: address of a server, as in `open_engine`.
        device: as in `open_engine`.
        dtype: as in `open_engine`.
        bits: as in `open_engine`.

    Raises:
        ValueError: the checkpoint, a picture, the template or the question cannot be used.
    """
    for what, text in (("question", question), ("system", system)):
        if text is not None and (reason := text_problem(text)):
            raise ValueError(f"{what} {reason}")
    pictures = [load_image(image) for image in images]
    engine = open_engine(checkpoint, endpoint, template, device, dtype, bits)
    talk = Conversation(engine, sampling, system)
    for image, picture in zip(images, pictures, strict=True):
        talk.show(image, picture)
    if question is not None:
        talk._is_single = True
        _tell(talk.ask(question).note)
        return
    for text in _typed():
        is_command = text.startswith("/")
        try:
            if is_command:
                if _obey(text, talk):
                    return
            else:
                reply = talk.ask(text)
                _tell(STOPPED if reply.finish == CANCELLED else reply.note or (None if reply.text else EMPTY))
        except BrokenModelError:
            raise
        except (
            ValueError,
            OSError,
            RuntimeError,
        ) as error:  # such as a conversation that has become too long
            _tell(str(error) if is_command else f"no answer: {error}")
        except KeyboardInterrupt as stop:
            if signal.SIGTERM in stop.args or not is_command:
                raise
            _tell("stopped")  # a picture that comes slowly


def _obey(line: str, talk: Conversation) -> bool:
    """Carry out a command of HELP; whether it ends the conversation."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/image", "/save") and not rest:
        raise ValueError(f"{name} must be followed by the name of a file")
    if name == "/image":
        rest = _unquoted(rest)
        talk.show(rest if "://" in rest else str(Path(rest).expanduser()))
        _tell(f"{len(talk.shown)} with the next question: {', '.join(name for name, _ in talk.shown)}")
    elif name == "/save":
        talk.save(_unquoted(rest))
        _tell(f"saved as {_unquoted(rest)}")
    elif name == "/reset":
        talk.reset()
        _tell("the conversation is empty")
    elif name == "/undo":
        _tell("forgotten" if talk.undo() else "there is no question to forget")
    elif name == "/quit":
        return True
    elif name == "/help":
        print(HELP)
    else:
        raise ValueError(f"{name} is no command; /help lists them")
    return False


def _unquoted(text: str) -> str:
    """A file name as typed, or dragged into a terminal that quotes it."""
    try:
        parts = shlex.split(text)
    except ValueError:  # an apostrophe
        return text
    return parts[0] if len(parts) == 1 else text


def _printable(text: str) -> str:
    """Text without control characters, with which an answer could command the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def _tell(text: str | None) -> None:
    if text:
        print(text, file=sys.stderr, flush=True)


def _typed() -> Iterator[str]:
    if sys.stdin is None:
        raise ValueError("questions must come from standard input, which is closed, or from --question")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        try:
            import readline  # noqa: F401  input() then edits lines and remembers them
        except ImportError:
            pass
        print("ask, or type /help; an empty line ends the conversation")
    while True:
        try:
            text = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        if not text:
            return
        yield text
