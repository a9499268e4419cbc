"""Conversation templates: those of CuMo's stages and those it inherits from LLaVA, as data.

    opening frame[0] SYSTEM frame[1]  first QUESTION reply  lead ANSWER end  again QUESTION reply  ...

The loss sees `lead ANSWER end`: what the model has to write. Without a system text there is no frame. Plain
is a caption behind its picture, and nothing else.
"""

from dataclasses import dataclass

IMAGE_MARKER = "<image>"

_CHAT = "A chat between a curious {} and an artificial intelligence assistant. "
_POLITE = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_USER = _CHAT.format("user") + _POLITE.format("user")
_HUMAN = _CHAT.format("human") + _POLITE.format("human")
_TAGGED = (  # no blank between its last two sentences, as in LLaVA
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
    """How turns become text; `<s>` and `</s>` stand for the tokenizer's own two tokens."""

    name: str
    system: str = ""
    opening: str = ""
    frame: tuple[str, str] = ("", "")
    first: str = ""
    again: str = ""
    reply: str = ""
    lead: str = ""
    end: str = ""
    picture: str = IMAGE_MARKER  # what is written for a picture
    reserved: tuple[str, ...] = ()  # inside a turn they would be read as the end of it
    instruct: bool = True  # False: caption only, whatever the human turn says is dropped


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
        # a literal <s> stands before the first question only, behind the tokenizer's own
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
# the other names that LLaVA's scripts use; its vicuna_v0 differs by a worked example in prompts only
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
    """The template of that name or alias; ValueError lists the known ones."""
    found = TEMPLATES.get(ALIASES.get(name, name))
    if found is None:
        raise ValueError(f"template must be one of {', '.join((*TEMPLATES, *ALIASES))}, got {name!r}")
    return found
