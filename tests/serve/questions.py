"""Twenty conversations, as transformers, vLLM and the client of OpenAI take them, and their right answers."""

import base64
import io
from pathlib import Path

import torch

from cumo_model import CumoForConditionalGeneration, CumoProcessor
from tests.serve.checkpoints import picture

NEW_TOKENS = 16
CLEAR = 16
# each turn is of the user, of the assistant, and so on; numbers are pictures
TALKS = (
    ((0, "what is in the picture"),),
    ((1, "what is in the picture"),),  # only the picture differs
    ((2, "what is in the picture"),),
    (("what is in the picture",),),
    (("how many dots are there",),),
    (("one two three " * 20,),),
    ((0, 1, "which of them is larger"),),
    ((1, 0, "which of them is larger"),),
    ((3, 3, "describe both pictures in one sentence"),),
    ((0, "what is in the picture"), ("a red square",), ("how many dots are there",)),
    ((0, "what is in the picture"), ("a red square",), (4, "the second")),
    (("yes no",), ("no",), (5, "what is in the picture"), ("one",), ("two",)),
    (("how many dots are there in", 6),),
    (("the first", 0, "the second", 2),),
    ((7,),),
    ((4, "one"),),
    ((5, "describe both pictures"),),
    ((0, 1, 2, "which of them is larger"),),
    ((0, 1, 2, 3, "which of them is larger"),),
    ((6, "one two three " * 10),),
)
SIZES = ((40, 30), (40, 30), (24, 24), (20, 90), (90, 20), (31, 47), (12, 10), (100, 100))


def image(number: int):
    return picture(number, *SIZES[number])


def url(number: int) -> str:
    file = io.BytesIO()
    image(number).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def messages(talk: tuple, form: str) -> list[dict]:
    """A conversation in the `form` of transformers ("image"), vLLM ("image_pil") or OpenAI ("image_url")."""

    def part(value) -> dict:
        if isinstance(value, str):
            return {"type": "text", "text": value}
        return {"type": form, form: {"url": url(value)} if form == "image_url" else image(value)}

    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": [part(value) for value in turn]} for i, turn in enumerate(talk)]


class Right:
    """The model in transformers, of which all answers are to be found again.

    `precise` is the same model in fp64. Its best logit must lead by CLEAR times the difference between the
    two models, an estimate of what rounding does: then no other order of sums changes an answer.
    """

    def __init__(self, folder: Path):
        load = CumoForConditionalGeneration.from_pretrained
        self.model = load(folder, dtype=torch.float32).eval()
        self.precise = load(folder, dtype=torch.float64).eval()
        self.processor = CumoProcessor.from_pretrained(folder)

    def inputs(self, talk: tuple) -> dict:
        return self.processor.apply_chat_template(
            messages(talk, "image"), tokenize=True, return_dict=True, return_tensors="pt",
            add_generation_prompt=True,
        )  # fmt: skip

    @torch.no_grad()
    def first_scores(self, talk: tuple) -> torch.Tensor:
        """Logits (V,) of the first token of the answer; the image token has none."""
        scores = self.model(**self.inputs(talk)).logits[0, -1]
        scores[self.processor.image_token_id] = -torch.inf
        return scores

    def answer(self, talk: tuple, new_tokens: int = NEW_TOKENS) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the answer."""
        inputs = self.inputs(talk)
        ids, found = inputs["input_ids"], []
        for model in (self.model, self.precise):
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            found.append(out[0, ids.shape[1] :].tolist())
        assert found[0] == found[1], "rounding decides this answer: give the checkpoint other weights"
        row = torch.cat([ids, torch.tensor(found[:1])], 1)
        inputs = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
        scores = []
        for model in (self.model, self.precise):
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            out = model(input_ids=row, **inputs).logits[0, ids.shape[1] - 1 : -1].double()
            out[:, self.processor.image_token_id : self.processor.image_token_id + 1] = -1e9
            scores.append(out)
        best, second = scores[1].topk(2).values.unbind(1)
        assert (best - second).min() > CLEAR * (scores[0] - scores[1]).abs().max(), "give it other weights"
        return ids[0].tolist(), found[0]
