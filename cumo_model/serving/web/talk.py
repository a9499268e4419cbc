"""The conversation of one browser session, and its answer while it is generated."""

import contextlib
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cumo_model.processing.pictures import load_image
from cumo_model.serving.messages import Message, pictures_of, text_problem, user_message
from cumo_model.serving.replies import CANCELLED, Stream
from cumo_model.serving.sampling import Sampling

STOPPED = "the answer was stopped"
EMPTY = "the answer is empty"
BUSY = "an answer is being written: wait for its end, or press Stop"
NOTHING = "there is no answer yet that could be asked for again"


@dataclass
class Turn:
    """A question and its answer.

    Attributes:
        question: the message of the user; its pictures are files of the conversation's folder.
        answer: the text so far.
        note: what the user must know about the answer, or "".
    """

    question: Message
    answer: str = ""
    note: str = ""


@dataclass
class Talk:
    """A conversation. Its methods may be called from several threads.

    Attributes:
        folder: of its pictures, which it makes and deletes itself.
        turns: those that are answered.
        current: the one that is being answered, or None.
        uploads: files of questions that are not answered yet, which are deleted with the conversation.
    """

    folder: Path
    turns: list[Turn] = field(default_factory=list)
    current: Turn | None = None
    uploads: set[str] = field(default_factory=set)

    def __post_init__(self):
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self._is_stopped = False

    def ask(
        self, engine: Any, text: str, files: Sequence[str], sampling: Sampling, system: str | None = None
    ) -> Iterator[None]:
        """Ask a question and read its answer; at each step it may have grown.

        Args:
            engine: `Local` or `Endpoint`.
            text: the question.
            files: files of its pictures, which are copied.
            sampling: options of generation.
            system: text of the system, or None.

        Raises:
            ValueError: the question or a picture cannot be used, or there is no answer; the conversation is
                as before.
        """
        if reason := text_problem(text, engine.template):
            raise ValueError(f"the question {reason}")
        yield from self._answered(engine, Turn(user_message(text)), None, files, sampling, system)

    def ask_again(self, engine: Any, sampling: Sampling, system: str | None = None) -> Iterator[None]:
        """Ask for another answer to the last question; arguments and errors as in `ask`."""
        if not self.turns:
            raise ValueError(BUSY if self.current else NOTHING)
        last = self.turns[-1]
        yield from self._answered(engine, Turn(last.question), last, (), sampling, system)

    def _answered(self, engine, turn: Turn, replaced: Turn | None, files, sampling, system) -> Iterator[None]:
        with self._lock:
            if self.current is not None:
                raise ValueError(BUSY)
            self.current, self._is_stopped = turn, False
            if replaced is not None:
                self.turns.remove(replaced)
        is_done, text = False, turn.question["content"][-1]["text"]
        try:
            for number, file in enumerate(files, 1):
                kept = [*pictures_of(turn.question), self._kept(file, f"picture {number} of the question")]
                turn.question = user_message(text, kept)
            with engine.stream(self.messages(system, turn), sampling) as stream:
                with self._lock:
                    self._stream = stream
                    if self._is_stopped:
                        stream.stop()
                yield
                for piece in stream.steps():
                    turn.answer += piece
                    yield
            reply = stream.reply
            turn.answer = reply.text
            if reply.finish == CANCELLED and not reply.text:
                raise ValueError(f"{STOPPED} before its first word")
            turn.note = STOPPED if reply.finish == CANCELLED else reply.note or ("" if reply.text else EMPTY)
            is_done = True
        finally:
            with self._lock:
                is_here = self.current is turn  # else the conversation was cleared
                if is_here:
                    self.current = self._stream = None
                    self.turns += [found for found in [turn if is_done else replaced] if found is not None]
            if files and not (is_here and is_done):
                for picture in pictures_of(turn.question):
                    Path(picture).unlink(missing_ok=True)

    def _kept(self, file: str, name: str) -> str:
        """A file of the conversation with this picture, upright and without its metadata."""
        picture = load_image(file, name=name)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{secrets.token_hex(16)}.png"
        picture.save(path, compress_level=1)
        return str(path)

    def stop(self) -> None:
        """End the answer that is being written; what there is of it stays."""
        with self._lock:
            self._is_stopped = True
            if self._stream is not None:
                self._stream.stop()

    def clear(self) -> None:
        """Forget everything, also an answer that is being written, and delete the pictures."""
        self.stop()
        with self._lock:
            self.turns, self.current, self._stream = [], None, None
            uploads, self.uploads = self.uploads, set()
        for file in uploads:
            Path(file).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def messages(self, system: str | None = None, turn: Turn | None = None) -> list[Message]:
        """The conversation as `Local.stream` takes it, up to the question of `turn`."""
        found: list[Message] = [{"role": "system", "content": system}] if system else []
        for done in self.turns:
            found += [done.question, {"role": "assistant", "content": done.answer}]
        return found + ([turn.question] if turn else [])

    def shown(self) -> list[Turn]:
        """All turns, also the one that is being answered."""
        with self._lock:
            return [*self.turns, *([self.current] if self.current else [])]

    def pictures(self) -> list[tuple[str, Message]]:
        """All pictures: file and question."""
        return [(path, turn.question) for turn in self.shown() for path in pictures_of(turn.question)]


class Talks:
    """The conversations of all sessions.

    Args:
        folder: in which each gets one for its pictures.
    """

    def __init__(self, folder: Path):
        self._folder, self._talks, self._lock = folder, {}, threading.Lock()

    def of(self, session: str) -> Talk:
        """The conversation of a session, a new one for a new session."""
        with self._lock:
            # the name of a session comes from its browser, so it names no folder
            return self._talks.setdefault(session, Talk(self._folder / secrets.token_hex(16)))

    def end(self, session: str) -> None:
        """Forget the conversation of a session whose page was closed."""
        with self._lock:
            talk = self._talks.pop(session, None)
        if talk is not None:
            talk.clear()

    def sweep(self, age: float = 3600) -> None:
        """Delete uploads that are `age` seconds old and about which nobody has asked."""
        with self._lock:
            kept = {talk.folder for talk in self._talks.values()}
        for file in self._folder.glob("*/*"):
            with contextlib.suppress(OSError):  # another thread may delete it
                if file.parent not in kept and file.is_file() and time.time() - file.stat().st_mtime > age:
                    file.unlink()

    def end_all(self) -> None:
        """End all sessions."""
        for session in list(self._talks):
            self.end(session)
