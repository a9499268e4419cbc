"""The demo's tokenizer: byte-level BPE, trained on the demo's own text."""

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
)  # ids 0 to 5; <unk> also pads, as in CuMo


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1200) -> PreTrainedTokenizerFast:
    """Learn merges from `texts`.

    Any text can be encoded (256 bytes are in the vocabulary) and comes back lower case. The blanks and
    newlines of the instruct template cost next to nothing: `[INST]`, `[/INST]` and `</s>` swallow the blanks
    that the template puts beside them, and a word is the same token everywhere, since every piece of text
    gets a leading blank.

    Args:
        texts: plain strings, without special tokens.
        vocab_size: wanted size, specials and bytes included; less if `texts` has fewer merges.

    Returns:
        A fast tokenizer with bos 1, eos 2 and pad = unk = 0; `tokenizer(text)` puts the BOS first.
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
