"""Whole models of cumo_model, random weights: python -m benchmarks.bench_model [--backend NAME] [--full]

clip-tower: the vision tower, backward to pixels and every weight. cumo-step: a training step's
loss and gradients of the whole model. cumo-generate: 16 greedy tokens. Layers are cut to what fits, and the
column `gate` says so. The gate runs in fp32: deep stacks of rounded routers choose other experts than fp64.
"""

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.eager import experts_loop
from benchmarks.harness import Case, Workload, main
from benchmarks.shapes import SHAPES, Shape
from cumo_kernels import Routing, use_backend
from cumo_model import CumoConfig, CumoForConditionalGeneration
from cumo_model.moe import Experts

OP = "model"


@dataclass(frozen=True)
class Size:
    """What of CuMo-7B is left; the CPU's is a few percent of it in every direction."""

    vision: dict
    text: dict
    images: int
    words: int
    note: str


def size_of(device: str) -> Size:
    if device == "cuda":
        text = {"model_type": "mistral", "num_hidden_layers": 4, "vocab_size": 32000}
        return Size({"num_hidden_layers": 6}, text, 1, 128, "6 of 24 tower layers, 4 of 32 text layers")
    vision = {
        "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": 112,
    }  # fmt: skip
    text = {
        "model_type": "mistral", "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2000,
    }  # fmt: skip
    return Size(
        vision, text, 1, 64, "width a quarter of CLIP's, a sixteenth of Mistral's; 4 + 2 layers, 112 px"
    )


def model_of(size: Size, device: str, dtype: torch.dtype) -> CumoForConditionalGeneration:
    torch.manual_seed(0)
    holder = size.text["vocab_size"]  # the first id outside
    config = CumoConfig(vision_config=size.vision, text_config=dict(size.text), image_token_index=holder)
    with torch.device(device):
        model = CumoForConditionalGeneration(config)
    return model.to(dtype).train()


@contextlib.contextmanager
def original_experts():
    """MoELayers compute their experts as the original's loop does."""
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
    base = SHAPES["clip-image" if device == "cuda" else "clip-1-crop"]
    dtype = "bf16" if device == "cuda" else "fp32"
    size = size_of(device)
    named = lambda name: Shape(**{**vars(base), "name": name, "T": size.images, "groups": 1})
    return [
        Case(named("clip-tower"), dtype, modes=("forward", "both"), gate_dtype="fp32"),
        Case(named("cumo-step"), dtype, modes=("both",), gate_dtype="fp32"),
        Case(named("cumo-generate"), dtype, modes=("forward",), gate_dtype="fp32"),
    ]


def setup(shape: Shape, dtype: torch.dtype, device: str, pattern: str) -> Workload:
    size = size_of(device)
    model = model_of(size, device, dtype)
    config = model.config
    side = config.vision_config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(size.images, 3, side, side, generator=generator).to(device, dtype)
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

    run = {"clip-tower": tower, "cumo-step": step, "cumo-generate": generate}[shape.name]

    def original(x: Tensor) -> Tensor:
        with original_experts():
            return run(x)

    def truth(x: Tensor) -> Tensor:
        with use_backend("reference"):
            return run(x)

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(pixels)
    return Workload(
        run=run,
        truth=truth,
        inputs=(pixels,),
        parameters=tuple(model.parameters()),
        flops=counter.get_total_flops(),
        peers={"cumo-original": original},
        note=size.note,
    )


if __name__ == "__main__":
    raise SystemExit(main(__name__))
