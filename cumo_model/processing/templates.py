"""Conversation templates as data: those of the CuMo stages and those inherited from LLaVA.

    opening frame[0] SYSTEM frame[1]  first QUESTION reply  lead ANSWER end  again QUESTION reply  ...

The loss covers `lead ANSWER end`, the text that the model generates. Without a system text the frame is
omitted. The template plain consists of the picture followed by its caption.
"""

from dataclasses import dataclass

IMAGE_MARKER = "<image>"

_CHAT = "A chat between a curious {} and an artificial intelligence assistant. "
_POLITE = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_USER = _CHAT.format("user") + _POLITE.format("user")
_HUMAN = _CHAT.format("human") + _POLITE.format("human")
_TAGGED = (  # no space between the last two sentences, as in LLaVA
    _CHAT.format("user")
    + "The assistant is able to understand the visual content that the user provides, and assist the user "
    "with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language."
)
_LLAMA = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
    "illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)
_MPT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest "
    "answers."
)


@dataclass(frozen=True)
class Template:
    """How turns are written as text. `<s>` and `</s>` stand for the tokenizer's BOS and EOS tokens."""

    name: str
    system: str = ""
    opening: str = ""
    frame: tuple[str, str] = ("", "")
    first: str = ""
    again: str = ""
    reply: str = ""
    lead: str = ""
    end: str = ""
    picture: str = IMAGE_MARKER  # the text of an image marker
    reserved: tuple[str, ...] = ()  # separators that must not occur inside a turn
    instruct: bool = True  # False: caption only; the text of the human turn is dropped


def _llama_2(name: str, system: str, bos: str, later_bos: str) -> Template:
    return Template(
        name,
        system,
        opening=f"{bos}[INST] ",
        frame=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        again=f"{later_bos}[INST] ",
        reply=" [/INST]",
        lead=" ",
        end=" </s>",
        reserved=("[/INST]", "</s>"),
    )


def _vicuna_v1(name: str, system: str, picture: str = IMAGE_MARKER) -> Template:
    return Template(
        name,
        system,
        frame=("", " "),
        first="USER: ",
        again="USER: ",
        reply=" ASSISTANT:",
        lead=" ",
        end="</s>",
        picture=picture,
        reserved=(" ASSISTANT: ", "</s>"),
    )


def _vicuna_v0(name: str, system: str, picture: str = IMAGE_MARKER) -> Template:
    return Template(
        name,
        system,
        frame=("", "###"),
        first="Human: ",
        again="Human: ",
        reply="###Assistant:",
        lead=" ",
        end="###",
        picture=picture,
        reserved=("###",),
    )


def _chatml(name: str, system: str) -> Template:
    return Template(
        name,
        system,
        frame=("<|im_start|>system\n", "<|im_end|>"),
        first="<|im_start|>user\n",
        again="<|im_start|>user\n",
        reply="<|im_end|><|im_start|>assistant\n",
        end="<|im_end|>",
        reserved=("<|im_start|>", "<|im_end|>"),
    )


_TAGS = f"<Image>{IMAGE_MARKER}</Image>"

TEMPLATES = {
    template.name: template
    for template in (
        Template("plain", end="\n", instruct=False),
        # a literal <s> precedes the first question only, in addition to the tokenizer's BOS
        _llama_2("mistral_instruct", "", "<s>", ""),
        _llama_2("mistral_instruct_system", _USER, "<s>", ""),
        _llama_2("llama_2", _LLAMA, "", "<s>"),
        _llama_2("llava_llama_2", _LLAVA, "", "<s>"),
        _vicuna_v1("vicuna_v1", _USER),
        _vicuna_v1("llava_v1", _HUMAN),
        _vicuna_v1("llava_v1_mmtag", _TAGGED, _TAGS),
        _vicuna_v0("llava_v0", _HUMAN),
        _vicuna_v0("llava_v0_mmtag", _TAGGED, _TAGS),
        _chatml("mpt", _MPT),
        _chatml("chatml_direct", "Answer the questions."),
    )
}
# other names in LLaVA's scripts; its vicuna_v0 differs only in prompts, which contain an example conversation
ALIASES = {
    "v0_plain": "plain",
    "v0": "llava_v0",
    "vicuna_v0": "llava_v0",
    "v0_mmtag": "llava_v0_mmtag",
    "v1": "vicuna_v1",
    "v1_mmtag": "llava_v1_mmtag",
    "mistral_direct": "chatml_direct",
}


def get_template(name: str) -> Template:
    """The template with this name or alias.

    Raises:
        ValueError: the name is unknown; the message lists the known names.
    """
    found = TEMPLATES.get(ALIASES.get(name, name))
    if found is None:
        raise ValueError(f"template must be one of {', '.join((*TEMPLATES, *ALIASES))}, got {name!r}")
    return found
