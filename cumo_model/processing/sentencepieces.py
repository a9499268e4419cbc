"""A fast tokenizer that reads as its SentencePiece model does, blanks included.

transformers 5 makes merges of a `tokenizer.model` in the order of its ids; SentencePiece merges by score, and
Mistral's runs of blanks have low ids and the lowest scores. It also puts no blank before a text that begins
with one. Both change ids wherever two blanks meet.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer

BLANK = "▁"


def like_sentencepiece(backend: Tokenizer, model: Path) -> Tokenizer:
    """`backend`, which transformers made of the BPE in `model`, with the ids of SentencePiece itself.

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
