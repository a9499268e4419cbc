"""How likely given answers are: for tasks that compare the probabilities of choices."""

from collections.abc import Sequence

import torch

from cumo_model.model.positions import position_limit
from cumo_model.processing.conversation import chat_template
from cumo_model.serving.local import Local
from cumo_model.serving.messages import Message


@torch.no_grad()
def log_likelihoods(
    engine: Local, talks: Sequence[Sequence[Message]], answers: Sequence[str]
) -> list[tuple[float, bool]]:
    """Log-probabilities of answers, computed as one batch.

    The tokens of an answer are those that follow the prompt in the conversation with this answer, without the
    end mark. The image token has no probability, as in generation.

    Args:
        engine: the model.
        talks: conversations that end with a question, as in `check_conversation`.
        answers: an answer for each; blanks around it have no meaning.

    Returns:
        For each answer the sum of the natural logarithms of its tokens' probabilities, and whether greedy
        decoding would generate it.

    Raises:
        ValueError: a conversation or an answer cannot be used; its number is named.
    """
    rows, kept = [], []
    for number, (talk, answer) in enumerate(zip(talks, answers, strict=True), 1):
        try:
            prompt = engine.inputs(talk)["input_ids"][0]
            whole = _with_answer(engine, [talk], [answer])["input_ids"][0]
            rows.append(
                _answer_length(prompt, whole, answer, position_limit(engine.model.config.text_config))
            )
        except ValueError as error:
            raise ValueError(f"conversation {number}: {error}") from None
        kept.append([*talk])
    if not kept:
        return []
    model, longest = engine.model, max(rows)
    inputs = _with_answer(engine, kept, answers)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with engine.alone():
        logits = model(**inputs, position_ids=positions, logits_to_keep=longest + 1).logits[:, :-1].float()
    image, words = model.config.image_token_index, logits.shape[-1]
    if 0 <= image < words:
        logits[..., image] = -torch.inf
    ids, best = inputs["input_ids"][:, -longest:], logits.argmax(-1)
    chosen = logits.log_softmax(-1).gather(-1, ids.clamp(0, words - 1)[..., None])[..., 0]
    return [
        (chosen[i, -length:].double().sum().item(), torch.equal(best[i, -length:], ids[i, -length:]))
        for i, length in enumerate(rows)
    ]


def _with_answer(
    engine: Local, talks: Sequence[Sequence[Message]], answers: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Tensors of conversations with their answers but without the end marks, padded on the left."""
    found = engine.processor.apply_chat_template(
        [
            [*talk, {"role": "assistant", "content": answer.strip()}]
            for talk, answer in zip(talks, answers, strict=True)
        ],
        chat_template=chat_template(engine.template),
        continue_final_message=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    return dict(found)


def _answer_length(prompt: torch.Tensor, whole: torch.Tensor, answer: str, limit: int | None) -> int:
    """Number of tokens of an answer: those after what it has in common with the prompt."""
    if not answer.strip():
        raise ValueError("the answer must not be empty")
    if limit is not None and len(whole) > limit:
        raise ValueError(
            f"the conversation with its answer must have at most {limit} tokens, the model's context, "
            f"got {len(whole)}"
        )
    shared = min(len(prompt), len(whole))
    return len(whole) - int((prompt[:shared] == whole[:shared]).int().cumprod(0).sum())
