"""Conversations to token ids: the templates CuMo was trained with, and which positions the loss sees.

    plain                    {image}{caption}\\n
    mistral_instruct         <s>[INST] {question} [/INST] {answer} </s>[INST] ...
    mistral_instruct_system  the same, with <<SYS>> and the Vicuna sentence pair before the first question

The loss sees the caption and its newline (plain has no `</s>`), or each answer, its `</s>` included.
One BOS always comes first; the instruct templates also write `<s>`, so theirs have two. A turn's image marker
moves to its front as `<image>\\n`. The text is tokenised in chunks between markers, each chunk on its own,
and every marker becomes `image_seq_length` image tokens. Where a tokenizer makes a token of the blank before
`</s>` (Mistral's SentencePiece does), that token is trained on too.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IMAGE_MARKER = "<image>"
IGNORE_INDEX = -100
ROLES = ("human", "gpt")  # alternate, human first
RESERVED = ("[/INST]", "</s>")  # inside a turn they would be read as the end of a question or an answer

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Template:
    """How turns become text."""

    name: str
    instruct: bool  # False: caption only, whatever the human turn says is dropped
    system: str = ""


TEMPLATES = {
    template.name: template
    for template in (
        Template("plain", instruct=False),
        Template("mistral_instruct", instruct=True),
        Template("mistral_instruct_system", instruct=True, system=_SYSTEM),
    )
}


def get_template(name: str) -> Template:
    """The template of that name; ValueError lists the known ones."""
    if name not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {name!r}")
    return TEMPLATES[name]


def turn_problem(turns: Any) -> str | None:
    """Why `turns` is not a conversation [{"from": "human" | "gpt", "value": str}, ...], human first and
    alternating; or None."""
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        return f"conversations must be a non-empty list of turns, got {_brief(turns)}"
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            return f"turn {number} must be an object with from and value, got {_brief(turn)}"
        missing = [key for key in ("from", "value") if key not in turn]
        if missing:
            return f"turn {number} has no {' and no '.join(missing)}"
        if turn["from"] not in ROLES:
            return f"turn {number}: from must be human or gpt, got {_brief(turn['from'])}"
        wanted = ROLES[(number - 1) % 2]
        if turn["from"] != wanted:
            return f"turn {number} must be {wanted}'s (human first, then alternating), got {turn['from']}"
        if not isinstance(turn["value"], str):
            return f"turn {number}: value must be text, got {_brief(turn['value'])}"
        if turn["from"] == "gpt" and IMAGE_MARKER in turn["value"]:
            return f"turn {number}: an answer must not hold {IMAGE_MARKER}"
    return None


def render(turns: Sequence[dict[str, str]], template: str) -> tuple[str, list[tuple[int, int]]]:
    """Write turns as text.

    Args:
        turns: alternating human and gpt turns; a last human turn without an answer makes a prompt.
        template: a name of TEMPLATES.

    Returns:
        The text without the tokenizer's own BOS, image markers still in it, and the (start, end) character
        spans the loss sees.

    Raises:
        ValueError: unknown template, or turns that do not form a conversation.
    """
    form, problem = get_template(template), turn_problem(turns)
    if problem:
        raise ValueError(problem)
    if not form.instruct:
        return _render_caption(turns)
    text, spans = "<s>", []
    for number, turn in enumerate(turns):
        value = _marker_first(turn["value"])
        if turn["from"] == "human":
            system = f"<<SYS>>\n{form.system}\n<</SYS>>\n\n" if form.system and number == 0 else ""
            text += f"[INST] {system}{value} [/INST]"
        else:
            start = len(text)
            text += f" {value} </s>"
            spans.append((start, len(text)))
    return text, spans


def _render_caption(turns: Sequence[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    if len(turns) > 2 or IMAGE_MARKER not in turns[0]["value"]:
        raise ValueError(
            f"template plain wants one {IMAGE_MARKER} turn and one caption, "
            f"got {len(turns)} turns: {_brief(turns)}"
        )
    if len(turns) == 1:
        return IMAGE_MARKER, []
    text = f"{IMAGE_MARKER}{turns[1]['value']}\n"
    return text, [(len(IMAGE_MARKER), len(text))]


def _marker_first(value: str) -> str:
    if IMAGE_MARKER not in value:
        return value
    return f"{IMAGE_MARKER}\n{value.replace(IMAGE_MARKER, '').strip()}".strip()


def tokenize_conversation(
    turns: Sequence[dict[str, str]], tokenizer, template: str, image_seq_length: int
) -> tuple[Tensor, Tensor]:
    """Token ids of one conversation and the labels of its loss.

    Args:
        turns: alternating human and gpt turns, human first; values may hold `<image>`.
        tokenizer: a fast transformers tokenizer that knows `<image>` as one token.
        template: a name of TEMPLATES.
        image_seq_length: image tokens per marker.

    Returns:
        ids (N,) and labels (N,), both int64; labels are -100 outside the answers. In the instruct templates a
        turn that holds a reserved marker ("[/INST]", "</s>") cannot be told apart from the template: all
        labels are -100 then, with a warning.
    """
    return tokenize_conversations([turns], tokenizer, template, image_seq_length)[0]


def tokenize_conversations(
    conversations: Sequence[Sequence[dict[str, str]]], tokenizer, template: str, image_seq_length: int
) -> list[tuple[Tensor, Tensor]]:
    """`tokenize_conversation` for many, in one call of the tokenizer (some twenty times faster)."""
    rendered = [render(turns, template) for turns in conversations]
    chunks = [text.split(IMAGE_MARKER) for text, _ in rendered]
    bos, image = _special_ids(tokenizer, with_image=any(len(pieces) > 1 for pieces in chunks))
    distinct = list(dict.fromkeys(piece for pieces in chunks for piece in pieces))
    encoded = tokenizer(
        distinct, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True
    )
    tokens = dict(
        zip(distinct, zip(encoded["input_ids"], encoded["offset_mapping"], strict=True), strict=True)
    )

    samples = []
    for number, (turns, (_, spans), pieces) in enumerate(zip(conversations, rendered, chunks, strict=True)):
        ids, labels, offset = [bos], [IGNORE_INDEX], 0
        for order, piece in enumerate(pieces):
            if order:
                ids += [image] * image_seq_length
                labels += [IGNORE_INDEX] * image_seq_length
                offset += len(IMAGE_MARKER)
            piece_ids, places = tokens[piece]
            ids += piece_ids
            labels += _labels(piece_ids, places, spans, offset)
            offset += len(piece)
        found = get_template(template).instruct and reserved_marker(turns)
        if found:
            warnings.warn(
                f"conversation {number} holds {found} inside a turn: none of its labels are used",
                stacklevel=2,
            )
            labels = [IGNORE_INDEX] * len(labels)
        samples.append((torch.tensor(ids), torch.tensor(labels)))
    return samples


def tokenize_prompt(
    turns: Sequence[dict[str, str]], tokenizer, template: str, image_seq_length: int
) -> Tensor:
    """Token ids (N,) int64 of turns that end with a question, up to where the answer begins."""
    if not turns or turns[-1].get("from") != "human":
        raise ValueError(f"a prompt must end with a human turn, got {_brief(turns)}")
    return tokenize_conversation(turns, tokenizer, template, image_seq_length)[0]


def chat_template(template: str) -> str:
    """The same grammar as a transformers chat template (Jinja); apply it with `tokenize=True`, which adds no
    further BOS. A leading system message takes the place of the template's own <<SYS>> text."""
    form = get_template(template)
    if not form.instruct:
        return (
            "{{ bos_token }}{% for message in messages %}"
            + _jinja_parts("image", IMAGE_MARKER)
            + "{% endfor %}"
        )
    # all strings are Jinja's: a line break of the template itself would be trimmed
    sides = [f"{{{{ {side!r} }}}}" for side in ("<<SYS>>\n", "\n<</SYS>>\n\n")]
    marker_line = IMAGE_MARKER + "\\n"
    default = f"{sides[0]}{{{{ {form.system!r} }}}}{sides[1]}" if form.system else ""
    return (
        "{% if messages and messages[0]['role'] == 'system' %}{% set message = messages[0] %}"
        f"{{% set system %}}{sides[0]}{_JINJA_TEXT}{sides[1]}{{% endset %}}{{% set turns = messages[1:] %}}"
        f"{{% else %}}{{% set system %}}{default}{{% endset %}}{{% set turns = messages %}}{{% endif %}}"
        "{{ bos_token + bos_token }}{% for message in turns %}"
        "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
        "{{ raise_exception('messages must alternate user and assistant, user first, with at most one system "
        "message before them, got ' + message['role'] + ' as number ' + loop.index | string) }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' }}{% if loop.first %}{{ system }}{% endif %}"
        f"{_jinja_parts('image', marker_line)}{_JINJA_TEXT}{{{{ ' [/INST]' }}}}"
        f"{{% else %}}{{{{ ' ' }}}}{_JINJA_TEXT}{{{{ ' ' + eos_token }}}}{{% endif %}}{{% endfor %}}"
    )


def _jinja_parts(kind: str, written: str) -> str:
    """Write `written` for every content part of that type (content may also be plain text: no parts)."""
    loop = f"{{% for part in message['content'] if part['type'] == '{kind}' %}}"
    return (
        f"{{% if message['content'] is not string %}}{loop}{{{{ '{written}' }}}}{{% endfor %}}{{% endif %}}"
    )


_JINJA_TEXT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
)


def _special_ids(tokenizer, with_image: bool) -> tuple[int, int]:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "tokenizer must be a fast one (it tells where each token lies in the text), "
            f"got {type(tokenizer).__name__}"
        )
    if tokenizer.bos_token_id is None:
        raise ValueError("tokenizer must have a bos_token, got none")
    image = tokenizer.convert_tokens_to_ids(IMAGE_MARKER)
    if with_image and (image is None or image == tokenizer.unk_token_id):
        raise ValueError(f"tokenizer must know {IMAGE_MARKER} as one token: add it as a special token")
    return tokenizer.bos_token_id, image


def _labels(
    ids: list[int], places: list[tuple[int, int]], spans: list[tuple[int, int]], offset: int
) -> list[int]:
    """A token is trained on when it lies inside an answer's span; spans and places are in text order."""
    labels, span = [], iter(spans)
    start, end = next(span, (1 << 60, 1 << 60))
    for token, (left, right) in zip(ids, places, strict=True):
        while left + offset >= end:
            start, end = next(span, (1 << 60, 1 << 60))
        labels.append(token if left + offset >= start and right + offset <= end else IGNORE_INDEX)
    return labels


def reserved_marker(turns: Sequence[dict[str, str]]) -> str | None:
    """What the instruct templates put between turns and one of `turns` holds, or None."""
    return next((mark for turn in turns for mark in RESERVED if mark in turn["value"]), None)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
