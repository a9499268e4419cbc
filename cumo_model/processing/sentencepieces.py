"""A fast tokenizer that gives the same ids as its SentencePiece model, also for runs of spaces.

transformers 5 orders the merges of a `tokenizer.model` by id, SentencePiece by score. In Mistral's model,
runs of spaces have low ids but the lowest scores. transformers 5 also adds no space before a text that
begins with one. Both differences change the ids of texts with two consecutive spaces.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer

BLANK = "▁"


def pieces_alike(backend: Tokenizer, marker: str) -> Tokenizer:
    """Change `backend` so that the text after a special token has the ids that it has alone.

    Tokenizers of Llama-2 that transformers made with `legacy=False` put a space before the first text only.

    Args:
        backend: any tokenizer.
        marker: a special token that must not remove the spaces around it.

    Returns:
        A new tokenizer, or `backend` itself if nothing had to be changed.
    """
    added = [t for t in backend.get_added_tokens_decoder().values() if t.content == marker]
    if "prepend_scheme=first" not in str(backend.pre_tokenizer) and not any(
        t.lstrip or t.rstrip for t in added
    ):
        return backend
    values = json.loads(backend.to_str())
    first = values["pre_tokenizer"] or {}
    for part in (first, *first.get("pretokenizers", ())):
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "always"
    for token in values["added_tokens"]:
        if token["content"] == marker:
            token["lstrip"] = token["rstrip"] = False
    return Tokenizer.from_str(json.dumps(values))


def like_sentencepiece(backend: Tokenizer, model: Path) -> Tokenizer:
    """Change `backend` so that it gives the ids of SentencePiece.

    Args:
        backend: the tokenizer that transformers made of the BPE model.
        model: the file tokenizer.model.

    Returns:
        A new tokenizer, or `backend` itself if it is not a BPE tokenizer.

    Raises:
        ValueError: the package sentencepiece is missing.
    """
    try:
        import sentencepiece
    except ModuleNotFoundError:
        raise ValueError(f"{model} needs the package sentencepiece, which is not installed") from None

    values = json.loads(backend.to_str())
    if values["model"]["type"] != "BPE":
        return backend
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    values["model"]["merges"].sort(key=lambda pair: -pieces.get_score(pieces.piece_to_id("".join(pair))))
    values["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": BLANK},
            {"type": "Replace", "pattern": {"String": " "}, "content": BLANK},
        ],
    }
    values["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(values))
