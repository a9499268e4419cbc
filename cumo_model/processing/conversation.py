"""Conversations to token ids: the templates CuMo was trained with, and which positions the loss sees.

    plain                    {image}{caption}\\n
    mistral_instruct         <s>[INST] {question} [/INST] {answer} </s>[INST] ...
    mistral_instruct_system  the same, with <<SYS>> and the Vicuna sentence pair before the first question

and those that CuMo inherits from LLaVA (`templates`). The loss sees the caption and its newline (plain has no
`</s>`), or each answer and what ends it: `</s>`, `###` or `<|im_end|>`. One BOS always comes first; Mistral's
templates also write `<s>`, so theirs have two. A turn's one image marker moves to its front as `<image>\\n`,
several stay where they are. The text is tokenised in chunks between markers, each chunk on its own, and every
marker becomes `image_seq_length` image tokens. Where a tokenizer makes a token of the blank before `</s>`
(Mistral's SentencePiece does), that token is trained on too.

LLaVA's own masks differ for two families that CuMo never used: with `###` it also trains on each turn's first
mark, and with `<|im_end|>` it leaves out that mark.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cumo_model.processing.templates import IMAGE_MARKER, Template, get_template

IGNORE_INDEX = -100
ROLES = ("human", "gpt")  # alternate, human first


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


def render(
    turns: Sequence[dict[str, str]], template: str, bos: str = "<s>", eos: str = "</s>"
) -> tuple[str, list[tuple[int, int]]]:
    """Write turns as text.

    Args:
        turns: alternating human and gpt turns; a last human turn without an answer makes a prompt.
        template: a name of templates.TEMPLATES.
        bos, eos: how the tokenizer writes its two tokens.

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
        return _render_caption(turns, form)

    def own(text: str) -> str:
        return text.replace("<s>", bos).replace("</s>", eos)

    text, spans = own(form.opening), []
    if form.system:
        text += form.frame[0] + form.system + form.frame[1]
    for number, turn in enumerate(turns):
        value = _with_markers(turn["value"], form)
        if turn["from"] == "human":
            text += own(form.again if number else form.first) + value + form.reply
        else:
            start = len(text)
            text += form.lead + value + own(form.end)
            spans.append((start, len(text)))
    return text, spans


def _render_caption(turns: Sequence[dict[str, str]], form: Template) -> tuple[str, list[tuple[int, int]]]:
    markers = turns[0]["value"].count(IMAGE_MARKER)
    if len(turns) > 2 or markers != 1:
        raise ValueError(
            f"template plain wants one {IMAGE_MARKER} turn and one caption, "
            f"got {len(turns)} turns, {markers} {IMAGE_MARKER} in the first: {_brief(turns)}"
        )
    if len(turns) == 1:
        return IMAGE_MARKER, []
    text = IMAGE_MARKER + turns[1]["value"] + form.end
    return text, [(len(IMAGE_MARKER), len(text))]


def _with_markers(value: str, form: Template) -> str:
    if value.count(IMAGE_MARKER) == 1:
        value = f"{IMAGE_MARKER}\n{value.replace(IMAGE_MARKER, '').strip()}".strip()
    return value.replace(IMAGE_MARKER, form.picture)


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
        ids (N,) and labels (N,), both int64; labels are -100 outside the answers. If a turn holds a reserved
        marker of the template ("[/INST]", "</s>"), which cannot be told apart from it, all labels are -100
        and there is a warning.
    """
    return tokenize_conversations([turns], tokenizer, template, image_seq_length)[0]


def tokenize_conversations(
    conversations: Sequence[Sequence[dict[str, str]]], tokenizer, template: str, image_seq_length: int
) -> list[tuple[Tensor, Tensor]]:
    """`tokenize_conversation` for many, in one call of the tokenizer (some twenty times faster)."""
    tokens_of = {"bos": getattr(tokenizer, "bos_token", None), "eos": getattr(tokenizer, "eos_token", None)}
    own = {name: token for name, token in tokens_of.items() if token}
    rendered = [render(turns, template, **own) for turns in conversations]
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
        found = reserved_marker(turns, template)
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
    further BOS. A leading system message takes the place of the template's own system text, and a last user
    message is a prompt: what comes before an answer is written behind it. Plain has no place for a system
    message, and of a user's message it takes the images alone."""
    form = get_template(template)
    if not form.instruct:
        return (
            "{{ bos_token }}{% for message in messages %}"
            "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') or loop.index > 2 %}"
            "{{ raise_exception('messages must be one of user with an image and at most one of assistant, "
            "its caption, for plain, got ' + message['role'] + ' as number ' + loop.index | string) }}"
            "{% endif %}{% if message['role'] == 'user' %}{% set marks %}"
            f"{_jinja_parts('image', IMAGE_MARKER)}{{% if message['content'] is string %}}"
            f"{{{{ '{IMAGE_MARKER}' * message['content'].count('{IMAGE_MARKER}') }}}}{{% endif %}}"
            "{% endset %}{% if not marks %}"
            "{{ raise_exception('messages must begin with an image in template plain') }}{% endif %}"
            f"{{{{ marks }}}}{{% else %}}{_JINJA_TEXT}{_jinja_string(form.end)}{{% endif %}}{{% endfor %}}"
        )
    frame = [_jinja_string(side) for side in form.frame]
    default = f"{frame[0]}{_jinja_string(form.system)}{frame[1]}" if form.system else ""
    begin = (
        f"{{% if loop.first %}}{{{{ system }}}}{_jinja_string(form.first)}"
        f"{{% else %}}{_jinja_string(form.again)}{{% endif %}}"
    )
    content, marks = "message['content']", f"replace({IMAGE_MARKER!r}, {form.picture!r})"
    # a lone marker inside a text moves to its front, as in `render`
    front = f"({IMAGE_MARKER + chr(10)!r} + {content}.replace({IMAGE_MARKER!r}, '').strip()).strip()"
    question = (
        f"{{% if {content} is not string %}}{_jinja_parts('image', form.picture + chr(10))}{_JINJA_TEXT}"
        f"{{% elif {content}.count({IMAGE_MARKER!r}) == 1 %}}{{{{ {front}.{marks} }}}}"
        f"{{% else %}}{{{{ {content}.{marks} }}}}{{% endif %}}"
    )
    return (
        "{% if messages and messages[0]['role'] == 'system' %}{% set message = messages[0] %}"
        f"{{% set system %}}{frame[0]}{_JINJA_TEXT}{frame[1]}{{% endset %}}{{% set turns = messages[1:] %}}"
        f"{{% else %}}{{% set system %}}{default}{{% endset %}}{{% set turns = messages %}}{{% endif %}}"
        f"{{{{ bos_token }}}}{_jinja_string(form.opening)}{{% for message in turns %}}"
        "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
        "{{ raise_exception('messages must alternate user and assistant, user first, with at most one system "
        "message before them, got ' + message['role'] + ' as number ' + loop.index | string) }}{% endif %}"
        f"{{% if message['role'] == 'user' %}}{begin}{question}{_jinja_string(form.reply)}"
        f"{{% else %}}{_jinja_string(form.lead)}{_JINJA_TEXT}{_jinja_string(form.end)}{{% endif %}}"
        "{% endfor %}"
    )


def _jinja_string(text: str) -> str:
    """Written as Jinja's own strings, since it would trim a line break of the template itself."""
    pieces = []
    for start, piece in enumerate(text.split("<s>")):
        pieces += ["bos_token"] * (start > 0)
        for stop, part in enumerate(piece.split("</s>")):
            pieces += ["eos_token"] * (stop > 0) + ([repr(part)] if part else [])
    return "".join(f"{{{{ {piece} }}}}" for piece in pieces)


def _jinja_parts(kind: str, written: str) -> str:
    """Write `written` for every content part of that type (content may also be plain text: no parts)."""
    loop = f"{{% for part in message['content'] if part['type'] == '{kind}' %}}"
    return (
        f"{{% if message['content'] is not string %}}{loop}{{{{ {written!r} }}}}{{% endfor %}}{{% endif %}}"
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


def reserved_marker(turns: Sequence[dict[str, str]], template: str) -> str | None:
    """What the template puts between turns and one of `turns` holds, or None."""
    marks = get_template(template).reserved
    return next((mark for turn in turns for mark in marks if mark in turn["value"]), None)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
