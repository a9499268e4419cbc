"""Whole models, random weights: python -m benchmarks.cases.bench_model [--backend NAME] [--full]

clip-tower: the vision tower, backward to pixels and every weight. cumo-step: loss and gradients of one
training step of the whole model. cumo-generate: 16 greedy tokens. The number of language-model layers is
reduced to what fits; the column `gate` gives it. The gate runs in fp32, on a GPU with fewer layers: deep
stacks of rounded routers choose other experts than fp64. It covers gradients of pixels, not of each weight.
"""

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases.eager import experts_loop
from benchmarks.cases.shapes import Shape
from benchmarks.harness import Case, Workload, main
from benchmarks.peers.table import compared_as_experts
from cumo_kernels import Routing, use_backend
from cumo_model import CumoConfig, CumoForConditionalGeneration
from cumo_model.model.moe import Experts

OP = "model"


@dataclass(frozen=True)
class Size:
    """The part of CuMo-7B that is built: `crops` for the tower, `images` for the whole model."""

    vision: dict
    text: dict
    crops: int
    images: int
    words: int
    note: str


SMALL_TEXT = {
    "model_type": "mistral", "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2000,
}  # fmt: skip
SMALL_VISION = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
    "image_size": 112,
}  # fmt: skip
ON_CPU = "width a quarter of CLIP's, a sixteenth of Mistral's; 4 + 2 layers, 112 px"
GATE = "-gate"  # suffix of a case: the reduced size, for which fp64 copies fit too


def mistral(layers: int) -> dict:
    return {"model_type": "mistral", "num_hidden_layers": layers, "vocab_size": 32000}


SIZES = {
    "cpu": dict.fromkeys(
        ("clip-tower", "cumo-step", "cumo-generate"), Size(SMALL_VISION, SMALL_TEXT, 1, 1, 64, ON_CPU)
    ),
    "cuda": {
        "clip-tower": Size({}, SMALL_TEXT, 10, 1, 128, "24 layers, the 10 crops of one image"),
        "clip-tower-gate": Size({"num_hidden_layers": 6}, SMALL_TEXT, 2, 1, 128, "6 of 24 layers, 2 crops"),
    }
    | {
        f"{name}{gate}": Size({"num_hidden_layers": tower}, mistral(layers), 10, 1, 128,
                              f"{tower} of 24 tower layers, {layers} of 32 text layers")
        for name in ("cumo-step", "cumo-generate")
        for gate, tower, layers in (("", 24, 16), (GATE, 6, 4))
    },
}  # fmt: skip


def config_of(size: Size) -> CumoConfig:
    holder = size.text["vocab_size"]  # the first id outside the vocabulary
    return CumoConfig(vision_config=size.vision, text_config=dict(size.text), image_token_index=holder)


def shape_of(name: str, device: str) -> Shape:
    """The tower's layers and tokens, or the language model's."""
    size = SIZES[device][name]
    config = config_of(size)
    vision, text = config.vision_config, config.text_config
    if name.startswith("clip-tower"):
        tokens = size.crops * ((vision.image_size // vision.patch_size) ** 2 + 1)
        hidden, inner, experts, chosen = (
            vision.hidden_size, vision.intermediate_size, vision.num_experts, vision.num_experts_per_tok,
        )  # fmt: skip
    else:
        tokens = size.images * (size.words + config.image_seq_length)
        hidden, inner, experts, chosen = text.hidden_size, text.intermediate_size, 1, 1
    return Shape(name, tokens, hidden, inner, hidden, experts, chosen, "quick_gelu", True)


def model_of(size: Size, device: str, dtype: torch.dtype) -> CumoForConditionalGeneration:
    torch.manual_seed(0)
    with torch.device(device):
        model = CumoForConditionalGeneration(config_of(size))
    return model.to(dtype).train()


@contextlib.contextmanager
def original_experts():
    """Inside, MoELayers run their experts with the original's loop."""
    plain = Experts.forward

    def loop(self: Experts, x: Tensor, routing: Routing, compat: str | None = None) -> Tensor:
        up, up_bias = self.up
        biases = () if up_bias is None else (up_bias, self.down_proj_bias)
        groups = 1 if routing.stats is None else routing.stats.mean_probs.shape[0]
        return experts_loop(
            x, routing.topk_weights, routing.topk_indices.long(), up, self.down_proj, *biases,
            activation=self.activation, groups=groups,
        )  # fmt: skip

    Experts.forward = loop
    try:
        yield
    finally:
        Experts.forward = plain


def cases(device: str, full: bool) -> list[Case]:
    dtype = "bf16" if device == "cuda" else "fp32"
    modes = {"clip-tower": ("forward", "both"), "cumo-step": ("both",), "cumo-generate": ("forward",)}
    return [
        Case(
            shape_of(name, device), dtype, modes=wanted, gate_dtype="fp32",
            gate_shape=shape_of(name + GATE, device) if name + GATE in SIZES[device] else None,
        )
        for name, wanted in modes.items()
    ]  # fmt: skip


def setup(shape: Shape, dtype: torch.dtype, device: str, pattern: str) -> Workload:
    size = SIZES[device][shape.name]
    model = model_of(size, device, dtype)
    config = model.config
    side = config.vision_config.image_size
    generator = torch.Generator().manual_seed(0)
    pictures = size.crops if shape.name.startswith("clip-tower") else size.images
    pixels = torch.randn(pictures, 3, side, side, generator=generator).to(device, dtype)
    words = torch.randint(3, config.text_config.vocab_size, (size.images, size.words), generator=generator)
    holders = torch.full((size.images, config.image_seq_length), config.image_token_index)
    ids = torch.cat([words[:, :4], holders, words[:, 4:]], 1).to(device)
    labels = ids.masked_fill(ids == config.image_token_index, -100)
    models = {dtype: model}

    def of(x: Tensor) -> CumoForConditionalGeneration:
        if x.dtype not in models:
            models[x.dtype] = copy.deepcopy(model).to(x.dtype)
        return models[x.dtype]

    def tower(x: Tensor) -> Tensor:
        return of(x).model.vision_tower(x).last_hidden_state

    def step(x: Tensor) -> Tensor:
        return of(x)(input_ids=ids, pixel_values=x, labels=labels).loss

    def generate(x: Tensor) -> Tensor:
        chosen = of(x).eval()
        return chosen.generate(
            input_ids=ids, pixel_values=x, max_new_tokens=16, min_new_tokens=16, do_sample=False
        ).float()

    run = {"clip-tower": tower, "cumo-step": step, "cumo-generate": generate}[shape.name.removesuffix(GATE)]

    def original(x: Tensor) -> Tensor:
        with original_experts():
            return run(x)

    def expected(x: Tensor) -> Tensor:
        with use_backend("reference"):
            return run(x)

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(pixels)
    return Workload(
        run=run,
        reference=expected,
        inputs=(pixels,),
        parameters=tuple(model.parameters()),
        flops=counter.get_total_flops(),
        peers={"cumo-original": original},
        gaps=compared_as_experts(),
        note=size.note,
    )


if __name__ == "__main__":
    raise SystemExit(main(__name__))
