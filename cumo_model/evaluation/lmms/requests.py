"""What tasks of lmms-eval ask for, as conversations and options of generation of this project."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cumo_model.processing.pictures import load_image
from cumo_model.processing.templates import IMAGE_MARKER
from cumo_model.serving.messages import Message
from cumo_model.serving.questions import Question
from cumo_model.serving.sampling import Sampling

NEW_TOKENS = 1024  # of a task that gives no max_new_tokens, as in the models of lmms-eval
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
READ = (
    "do_sample",
    "max_new_tokens",
    "num_beams",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
    "until",
)


@dataclass(frozen=True)
class Wanted:
    """How a task wants its answers.

    Attributes:
        sampling: options of generation.
        until: the answer ends before the first of these texts.
        unused: names of options that have no effect.
    """

    sampling: Sampling
    until: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def cut(self, answer: str) -> str:
        """An answer up to the first of `until`, without blanks around it."""
        ends = [place for text in self.until if (place := answer.find(text)) >= 0]
        return answer[: min(ends)].strip() if ends else answer


def wanted(options: Mapping[str, Any]) -> Wanted:
    """Read the `generation_kwargs` of a task.

    `do_sample: false` is greedy decoding, whatever the temperature; without `do_sample` a temperature above 0
    samples. The options of sampling have no effect on greedy decoding.

    Raises:
        ValueError: an option has a value that CuMo's generation does not offer and that changes the answers.
    """
    given = {name: value for name, value in options.items() if value is not None}
    unused = [name for name in given if name not in READ]
    for name in ("num_beams", "repetition_penalty"):
        if given.get(name, 1) != 1:
            raise ValueError(
                f"{name} must be 1 with the model cumo, got {given[name]!r}: give --gen_kwargs {name}=1"
            )
    until = given.get("until", ())
    until = (until,) if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(text, str) for text in until):
        raise ValueError(f"until must be a text or a list of texts, got {until!r}")
    until = tuple(text for text in until if text)
    temperature = given.get("temperature", 1.0 if given.get("do_sample") else 0.0)
    top_k = given.get("top_k", 0)
    is_greedy = not given.get("do_sample", True) or temperature == 0 or top_k == 1
    length = given.get("max_new_tokens", NEW_TOKENS)
    if is_greedy:
        return Wanted(Sampling(length), until, tuple(unused))
    if top_k not in (0, -1):
        raise ValueError(
            f"top_k must be 0 or 1 with the model cumo, got {top_k!r}: give --gen_kwargs top_k=0"
        )
    return Wanted(Sampling(length, temperature, given.get("top_p", 1.0)), until, tuple(unused))


def conversation(text: str, visuals: Sequence[Any] | None, system: str | None = None) -> list[Message]:
    """The conversation of a task without messages: the pictures, then the text.

    Args:
        text: the question; each `<image>` in it stands for a picture, unless there is none.
        visuals: pictures, or paths of pictures; None: none.
        system: text for the system's place.

    Raises:
        ValueError: `visuals` holds anything else, such as a video, or `text` has some of the markers only.
    """
    if not isinstance(text, str):
        raise ValueError(f"the question must be text, got {type(text).__name__}")
    pictures = [_picture(visual) for visual in visuals or ()]
    return [*_system(system), _message(text, pictures)]


def from_messages(messages: Sequence[Mapping[str, Any]], system: str | None = None) -> list[Message]:
    """The conversation of a task with messages.

    Args:
        messages: {"role", "content"}; parts of the content are {"type": "text", "text": str} or
            {"type": "image", "url": a picture or its path}.
        system: text for the system's place, if the messages have none.

    Raises:
        ValueError: a part is of another type, such as a video.
    """
    found: list[Message] = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts: list[dict] = []
        for part in content:
            if part["type"] not in ("text", "image"):
                raise MediaError(f"pictures are what CuMo takes, got {part['type']}")
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            else:
                parts.append({"type": "image", "image": _picture(part.get("url", part.get("image")))})
        texts = [part["text"] for part in parts if part["type"] == "text"]
        pictures = [part["image"] for part in parts if part["type"] == "image"]
        if any(IMAGE_MARKER in text for text in texts):
            found.append(_message("".join(texts), pictures) | {"role": message["role"]})
        else:
            found.append({"role": message["role"], "content": parts if pictures else "".join(texts)})
    is_told = bool(found) and found[0]["role"] == "system"
    return found if is_told else [*_system(system), *found]


class MediaError(ValueError):
    """A task shows something other than pictures."""


def _system(text: str | None) -> list[Message]:
    return [{"role": "system", "content": text}] if text else []


def _message(text: str, pictures: list[Image.Image]) -> Message:
    marks = text.count(IMAGE_MARKER)
    if marks not in (0, len(pictures)):
        raise ValueError(
            f"the question must have one {IMAGE_MARKER} for each of its {len(pictures)} pictures, or none, "
            f"got {marks}"
        )
    return Question(0, text, ("",) * len(pictures)).message(pictures)


def _picture(visual: Any) -> Image.Image:
    if isinstance(visual, str | Path) and Path(visual).suffix.lower() not in PICTURES:
        raise MediaError(f"pictures are what CuMo takes, got {str(visual)!r}")
    if isinstance(visual, Mapping) or not isinstance(visual, str | Path | Image.Image):
        raise MediaError(f"pictures are what CuMo takes, got {type(visual).__name__}")
    return load_image(visual)


def in_batches(lengths: Sequence[int], groups: Sequence[Any], size: int) -> list[list[int]]:
    """Split requests into batches: those of one group together, the longest first.

    Args:
        lengths: of each request, in any unit.
        groups: a hashable for each; a batch holds requests of one group only.
        size: the largest number of requests in a batch.

    Returns:
        The numbers of the requests of each batch.
    """
    by_group: dict[Any, list[int]] = {}
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        by_group.setdefault(groups[number], []).append(number)
    return [
        numbers[start : start + size]
        for numbers in by_group.values()
        for start in range(0, len(numbers), size)
    ]


def halved(function: Callable[[list], list], items: list, stop: type[Exception]) -> list:
    """The results of a batch; for an item that fails also on its own, the reason as text.

    Args:
        function: takes a list and returns a list of results, or raises ValueError, RuntimeError or
            MemoryError for one of its items or for lack of memory.
        items: the batch.
        stop: errors that concern all batches, which are raised.
    """
    try:
        return function(items)
    except stop:
        raise
    except (ValueError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split()) or "not enough memory"
    # here the error no longer holds the tensors
    if len(items) == 1:
        return [reason.removeprefix("conversation 1: ")]  # which is the only one
    half = (len(items) + 1) // 2
    return [*halved(function, items[:half], stop), *halved(function, items[half:], stop)]
