"""The tokenizer of the demo: byte-level BPE, trained on the text of the demo."""

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "<image>",
    "[INST]",
    "[/INST]",
)  # ids 0 to 5; <unk> is also the padding token, as in CuMo


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1200) -> PreTrainedTokenizerFast:
    """Train a tokenizer on `texts`.

    Any text can be encoded, as all 256 bytes are in the vocabulary; decoded text is lower case. The spaces
    and newlines of the instruct template need few tokens: `[INST]`, `[/INST]` and `</s>` absorb the adjacent
    spaces of the template. A word is the same token at all positions, because every piece of text gets a
    leading space.

    Args:
        texts: plain strings, without special tokens.
        vocab_size: requested size, including special tokens and bytes; smaller if `texts` has fewer merges.

    Returns:
        A fast tokenizer with bos 1, eos 2 and pad = unk = 0; `tokenizer(text)` begins with BOS.
    """
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [
        AddedToken(
            text,
            special=True,
            normalized=False,
            lstrip=text in ("[/INST]", "</s>"),
            rstrip=text in ("[INST]", "[/INST]"),
        )
        for text in SPECIAL_TOKENS
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=specials[0],
        bos_token=specials[1],
        eos_token=specials[2],
        pad_token=specials[0],
        extra_special_tokens=specials[3:],
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
