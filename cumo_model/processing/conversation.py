"""Conversion of conversations to token ids and labels, with the templates that CuMo was trained with.

    plain                    {image}{caption}\\n
    mistral_instruct         <s>[INST] {question} [/INST] {answer} </s>[INST] ...
    mistral_instruct_system  the same, with <<SYS>> and the Vicuna sentence pair before the first question

Further templates are inherited from LLaVA (`templates`).

Labels: the loss covers the caption and its newline (plain has no `</s>`), or each answer and its end mark
(`</s>`, `###` or `<|im_end|>`). If the tokenizer makes a separate token of the space before `</s>`, as
Mistral's SentencePiece does, that token is trained on too.

Tokens: one BOS always comes first. Mistral's templates also write `<s>`, so they start with two. If a turn
has exactly one image marker, it is moved to the start of the turn as `<image>\\n`; several markers keep their
places. In a chat, the parts of a message are joined to such a text: a picture is `<image>`, and `<image>\\n`
before all text. The text is split at the markers, each part is tokenised separately, and each marker becomes
`image_seq_length` image tokens.

LLaVA's masks differ for two template families that CuMo never used: with `###` LLaVA also trains on the first
mark of each turn, and with `<|im_end|>` it does not train on that mark.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from cumo_model.processing.templates import IMAGE_MARKER, Template, get_template

IGNORE_INDEX = -100
ROLES = ("human", "gpt")  # in turn, human first
GENERATION = ("{% generation %}", "{% endgeneration %}")  # around an answer in a chat template


def turn_problem(turns: Any) -> str | None:
    """The reason why `turns` is not a valid conversation, or None.

    A conversation is [{"from": "human" | "gpt", "value": str}, ...], alternating, human first.
    """
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
        turns: alternating human and gpt turns. If the last turn is a human turn, the text is a prompt.
        template: a name of templates.TEMPLATES.
        bos: the tokenizer's BOS token as text.
        eos: the tokenizer's EOS token as text.

    Returns:
        The text, with image markers and without the tokenizer's own BOS, and the (start, end) character spans
        that the loss covers.

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
            f"template plain must have one {IMAGE_MARKER} turn and one caption, "
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
    turns: Sequence[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    image_seq_length: int,
) -> tuple[Tensor, Tensor]:
    """Tokenise one conversation and make the labels of its loss.

    Args:
        turns: alternating human and gpt turns, human first; values may contain `<image>`.
        tokenizer: a fast transformers tokenizer with `<image>` as one token.
        template: a name of TEMPLATES.
        image_seq_length: image tokens per marker.

    Returns:
        ids (N,) and labels (N,), both int64; labels are -100 outside the answers. If a turn contains a
        reserved marker of the template ("[/INST]", "</s>"), the end of the turn is ambiguous. All labels are
        then -100, and a warning is issued.
    """
    return tokenize_conversations([turns], tokenizer, template, image_seq_length)[0]


def tokenize_conversations(
    conversations: Sequence[Sequence[dict[str, str]]],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    image_seq_length: int,
) -> list[tuple[Tensor, Tensor]]:
    """`tokenize_conversation` for many conversations in one tokenizer call (about twenty times faster)."""
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
    turns: Sequence[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    image_seq_length: int,
) -> Tensor:
    """Tokenise a prompt: ids (N,) int64 of turns that end with a question, up to the start of the answer."""
    if not turns or turns[-1].get("from") != "human":
        raise ValueError(f"a prompt must end with a human turn, got {_brief(turns)}")
    return tokenize_conversation(turns, tokenizer, template, image_seq_length)[0]


@functools.cache
def chat_template(template: str) -> str:
    """Write a template as a transformers chat template (Jinja).

    The text that it writes starts with the tokenizer's BOS. A leading system message replaces the system text
    of the template. If the last message is from the user, the result is a prompt and ends with the text that
    precedes an answer. Plain accepts no system message and uses only the picture of a user message. Pictures
    in other messages and parts of other types are errors. Answers are marked, for
    `return_assistant_tokens_mask`: the mask selects the tokens that have labels.
    """
    form = get_template(template)
    answer = f"{_jinja_string(form.lead)}{{{{ content }}}}{_jinja_string(form.end)}"
    answer = GENERATION[0] + answer + GENERATION[1]
    if not form.instruct:
        return (
            "{{ bos_token }}{% for message in messages %}"
            "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') or loop.index > 2 %}"
            "{{ raise_exception('messages must be one of user with an image and at most one of assistant, "
            "its caption, for plain, got ' + message['role'] + ' as number ' + loop.index | string) }}"
            f"{{% endif %}}{_JINJA_CONTENT}{{% if message['role'] == 'user' %}}"
            f"{{% if content.count({IMAGE_MARKER!r}) != 1 %}}"
            "{{ raise_exception('messages must have exactly one image for plain, got ' + "
            f"content.count({IMAGE_MARKER!r}) | string) }}}}{{% endif %}}"
            f"{IMAGE_MARKER}{{% else %}}{answer}{{% endif %}}{{% endfor %}}"
        )
    frame = [_jinja_string(side) for side in form.frame]
    default = f"{frame[0]}{_jinja_string(form.system)}{frame[1]}" if form.system else ""
    begin = (
        f"{{% if loop.first %}}{{{{ system }}}}{_jinja_string(form.first)}"
        f"{{% else %}}{_jinja_string(form.again)}{{% endif %}}"
    )
    marks = f"replace({IMAGE_MARKER!r}, {form.picture!r})"
    # a single marker moves to the start of the text, as in `render`
    front = f"({IMAGE_MARKER + chr(10)!r} + content.replace({IMAGE_MARKER!r}, '').strip()).strip()"
    question = (
        f"{{% if content.count({IMAGE_MARKER!r}) == 1 %}}{{{{ {front}.{marks} }}}}"
        f"{{% else %}}{{{{ content.{marks} }}}}{{% endif %}}"
    )
    return (
        "{% if messages and messages[0]['role'] == 'system' %}{% set message = messages[0] %}"
        f"{_JINJA_CONTENT}{{% set system %}}{frame[0]}{{{{ content }}}}{frame[1]}{{% endset %}}"
        "{% set turns = messages[1:] %}"
        f"{{% else %}}{{% set system %}}{default}{{% endset %}}{{% set turns = messages %}}{{% endif %}}"
        f"{{{{ bos_token }}}}{_jinja_string(form.opening)}{{% for message in turns %}}"
        "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
        "{{ raise_exception('messages must alternate user and assistant, user first, with at most one system "
        "message before them, got ' + message['role'] + ' as number ' + loop.index | string) }}{% endif %}"
        f"{_JINJA_CONTENT}{{% if message['role'] == 'user' %}}{begin}{question}{_jinja_string(form.reply)}"
        f"{{% else %}}{answer}{{% endif %}}{{% endfor %}}"
    )


@functools.lru_cache(64)
def template_of(chat: str | None, names: tuple[str, ...]) -> str | None:
    """The one of `names` whose chat template is `chat`, or writes the same text, or None.

    Processors that were saved by earlier versions have chat templates that write the same text.
    """

    def written(template: str, count: int) -> str | None:
        turns = [f"{IMAGE_MARKER}\nwhat?", "this", "and now?"][:count]
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        try:
            special = {"bos_token": "<s>", "eos_token": "</s>"}
            return render_jinja_template([messages], chat_template=template, **special)[0][0]
        except Exception:  # templates raise errors of many kinds for conversations that they do not take
            return None

    for name in names if chat else ():
        count = 3 if get_template(name).instruct else 2
        if chat == chat_template(name) or written(chat, count) == written(chat_template(name), count):
            return name
    return None


def check_pieces(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a text after `<image>` has the ids that it has alone.

    Training data are tokenised piece by piece, as in the original code, prompts as a whole.

    Raises:
        ValueError: the ids differ.
    """
    image = tokenizer.convert_tokens_to_ids(IMAGE_MARKER)
    for before, after in (("a", "a"), ("a ", "\nb"), ("\n", " b")):
        whole, *pieces = tokenizer([before + IMAGE_MARKER + after, before, after], add_special_tokens=False)[
            "input_ids"
        ]
        if whole != [*pieces[0], image, *pieces[1]]:
            raise ValueError(
                f"tokenizer must give the text after {IMAGE_MARKER} the ids that it has alone, got {whole} "
                f"for {before + IMAGE_MARKER + after!r}: load it with cumo_model.processing.load_tokenizer"
            )


def answer_mask(places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for the tokens that lie in a span of text, by the rule that also selects the labels.

    Args:
        places: (start, end) characters of each token of a text.
        spans: (start, end) characters of the answers, in order.
    """
    return [int(label != IGNORE_INDEX) for label in _labels([0] * len(places), places, spans, 0)]


def _jinja_string(text: str) -> str:
    """`text` as Jinja string expressions, because Jinja would remove a newline at the end of a template."""
    pieces = []
    for start, piece in enumerate(text.split("<s>")):
        pieces += ["bos_token"] * (start > 0)
        for stop, part in enumerate(piece.split("</s>")):
            pieces += ["eos_token"] * (stop > 0) + ([repr(part)] if part else [])
    return "".join(f"{{{{ {piece} }}}}" for piece in pieces)


# sets `content` to the text of a message; a newline follows pictures before all text, as in LLaVA
_JINJA_CONTENT = (
    "{% set content %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set place = namespace(is_front=true) %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% if part['text'] %}{% set place.is_front = false %}"
    "{% endif %}{% elif part['type'] in ('image', 'image_url') %}"
    f"{{{{ {IMAGE_MARKER + chr(10)!r} if place.is_front else {IMAGE_MARKER!r} }}}}"
    "{% else %}{{ raise_exception('parts of a message must be of type text or image, got ' "
    "+ part['type'] | string) }}{% endif %}{% endfor %}{% endif %}{% endset %}"
    f"{{% if message['role'] != 'user' and {IMAGE_MARKER!r} in content %}}"
    "{{ raise_exception('only messages of the user may have images, got one of ' + message['role']) }}"
    "{% endif %}"
)


def _special_ids(tokenizer, with_image: bool) -> tuple[int, int]:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "tokenizer must be a fast one, which gives the offsets of tokens in the text, "
            f"got {type(tokenizer).__name__}"
        )
    if tokenizer.bos_token_id is None:
        raise ValueError("tokenizer must have a bos_token, got none")
    image = tokenizer.convert_tokens_to_ids(IMAGE_MARKER)
    if with_image and (image is None or image == tokenizer.unk_token_id):
        raise ValueError(f"tokenizer must have {IMAGE_MARKER} as one token: add it as a special token")
    return tokenizer.bos_token_id, image


def _labels(
    ids: list[int], places: list[tuple[int, int]], spans: list[tuple[int, int]], offset: int
) -> list[int]:
    """Labels of one text part: a token inside a span is a target. Spans and places are in text order."""
    labels, span = [], iter(spans)
    start, end = next(span, (1 << 60, 1 << 60))
    for token, (left, right) in zip(ids, places, strict=True):
        while left + offset >= end:
            start, end = next(span, (1 << 60, 1 << 60))
        labels.append(token if left + offset >= start and right + offset <= end else IGNORE_INDEX)
    return labels


def reserved_marker(turns: Sequence[dict[str, str]], template: str) -> str | None:
    """The first separator of the template that occurs inside one of `turns`, or None."""
    marks = get_template(template).reserved
    return next((mark for turn in turns for mark in marks if mark in turn["value"]), None)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
