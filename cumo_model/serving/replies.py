"""Answers while they are generated (`Stream`) and when they are complete (`Reply`)."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

# why an answer ended: by its end mark, by max_new_tokens, by the context, or because the reader left
STOP, LENGTH, CONTEXT, CANCELLED = "stop", "length", "context", "cancelled"
CUT = {
    LENGTH: "the answer was cut after {tokens} tokens, the longest asked for",
    CONTEXT: "the answer was cut after {tokens} tokens, where the model's context is full",
}


@dataclass(frozen=True)
class Reply:
    """A complete answer.

    Attributes:
        text: the answer without its end mark and without blanks around it.
        finish: STOP, LENGTH, CONTEXT or CANCELLED, or a reason of its own that a server gives.
        tokens: number of generated tokens; None if an endpoint does not say.
        prompt_tokens: number of tokens of the prompt, those of pictures included; None likewise.
    """

    text: str
    finish: str = STOP
    tokens: int | None = None
    prompt_tokens: int | None = None

    @property
    def note(self) -> str | None:
        """A sentence for the user if the answer was cut, else None."""
        told = CUT.get(self.finish)
        if told is None and self.finish not in (STOP, CANCELLED):
            told = f"the server ended the answer: {self.finish}"
        return told and told.format(tokens=self.tokens if self.tokens is not None else "some")


Source = Generator[str, None, tuple[str, int | None, int | None]]  # pieces; finish, tokens, prompt_tokens


class Stream:
    """Iterates over the pieces of an answer while it is generated; joined, they are `reply.text`.

    Use it in a `with` block, whose end also ends the generation.

    Args:
        source: yields pieces of text, which may be empty, and returns (finish, tokens, prompt_tokens).
        end: the mark that ends an answer and is not part of it, or "".
    """

    def __init__(self, source: Source, end: str = ""):
        self._source, self._end = source, end
        self._text = self._given = ""  # what came, and what of it was given to the reader
        self._reply: Reply | None = None
        self._is_stopped = False

    @property
    def reply(self) -> Reply:
        """The answer so far; its finish is CANCELLED if the stream was left before its end."""
        return self._reply or Reply(self._given.rstrip(), CANCELLED)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """End the generation, if it still runs."""
        self._source.close()

    def stop(self) -> None:
        """End the generation from another thread: whoever reads the stream comes to its end soon."""
        self._is_stopped = True

    def __iter__(self) -> Iterator[str]:
        return filter(None, self.steps())

    def steps(self) -> Iterator[str]:
        """The pieces, and "" from time to time while there is no new one, for a reader who does more."""
        while self._reply is None:
            if self._is_stopped:
                self.close()
                return
            try:
                self._text += next(self._source)
            except StopIteration as stop:
                said = self._said(self._text)
                self._reply = Reply(said, *(stop.value or (CANCELLED,)))  # no value: it was closed before
                if more := said[len(self._given) :]:
                    self._given = said
                    yield more
                return
            more = self._certain(self._text)[len(self._given) :]
            self._given += more
            yield more

    def _said(self, text: str) -> str:
        """A complete answer without its end mark and the blanks around it."""
        return text.strip().removesuffix(self._end).strip()

    def _certain(self, text: str) -> str:
        """The part of an incomplete answer that is in the complete one, whatever follows."""
        text = text.strip()
        for length in range(len(self._end), 0, -1):
            if text.endswith(self._end[:length]):
                return text[:-length].rstrip()
        return text

    def read(self, each: Callable[[str], None] = lambda piece: None) -> Reply:
        """Read to the end and return the answer; `each` is called with every piece."""
        with self:
            for piece in self:
                each(piece)
        return self.reply
