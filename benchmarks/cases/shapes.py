"""The layers of CuMo at the sizes of its training and inference, and layers of other well-known models.

CLIP: 577 tokens a crop, 10 crops an image at scales 1 and 3. Connector: 576 tokens an image. Language model:
Mixtral 8x7B.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """One expert layer; letters as in cumo_kernels/types.py."""

    name: str
    T: int
    H: int
    I: int
    O: int
    E: int
    K: int
    activation: str
    bias: bool
    groups: int = 1  # sets over which one balance loss averages: crops, images or the whole batch

    @property
    def is_gated(self) -> bool:
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    @property
    def slots(self) -> int:
        return self.T * self.K

    @property
    def width(self) -> int:
        """Rows of up_proj."""
        return self.I * (1 + self.is_gated)

    @property
    def sizes(self) -> str:
        return f"H{self.H} I{self.I} O{self.O} E{self.E} K{self.K}"

    @property
    def gemm_flops(self) -> int:
        """2 S (width H + O I): both GEMMs forward; backward is twice that."""
        return 2 * self.slots * (self.width * self.H + self.O * self.I)

    @property
    def weights(self) -> int:
        """Elements of both weights and biases of all experts."""
        return self.E * (self.width * self.H + self.O * self.I + self.bias * (self.width + self.O))


def clip(crops: int, name: str) -> Shape:
    return Shape(name, 577 * crops, 1024, 4096, 1024, 4, 2, "quick_gelu", True, groups=crops)


def connector(images: int, name: str) -> Shape:
    return Shape(name, 576 * images, 2048, 4096, 4096, 4, 2, "gelu", True, groups=images)


def mixtral(tokens: int, name: str) -> Shape:
    return Shape(name, tokens, 4096, 14336, 4096, 8, 2, "swiglu", False)


SHAPES = {
    shape.name: shape
    for shape in (
        clip(1, "clip-1-crop"),
        clip(9, "clip-scale3"),
        clip(10, "clip-image"),  # inference, one image
        clip(20, "clip-batch2"),  # 8x7B stage 3
        clip(40, "clip-batch4"),  # 7B stage 3
        clip(80, "clip-batch8"),
        connector(1, "connector-1"),
        connector(4, "connector-4"),
        connector(8, "connector-8"),
        connector(32, "connector-32"),  # the batch of stage 1
        mixtral(1, "mixtral-decode1"),
        mixtral(16, "mixtral-decode16"),
        mixtral(64, "mixtral-decode64"),
        mixtral(700, "mixtral-prefill"),  # an image and a question
        mixtral(8192, "mixtral-train"),  # 2 x 4096, stage 3
        mixtral(16384, "mixtral-train2"),
        # sizes of other models, so that nothing is tuned to CuMo alone
        Shape("qwen3-30b-a3b", 8192, 2048, 768, 2048, 128, 8, "swiglu", False),
        Shape("olmoe-7b", 8192, 2048, 1024, 2048, 64, 8, "swiglu", False),
        # Mixtral, hidden and intermediate size a quarter: small enough for an fp64 gate on a CPU
        replace(mixtral(256, "mixtral-quarter"), H=1024, I=3584, O=1024),
    )
}


def tiny(shape: Shape) -> Shape:
    """`shape` reduced so that an interpreter runs it in a second: for rehearsals, not for timings."""
    groups = 1 if shape.groups == 1 else 3
    tokens = min(shape.T, 33)
    return replace(
        shape, T=tokens - tokens % groups or tokens, H=64, I=48, O=64 if shape.O == shape.H else 96,
        E=min(shape.E, 4), K=min(shape.K, 2), groups=groups if tokens >= groups else 1,
    )  # fmt: skip


# measured first, by device: an interrupted run has the most important shapes
FIRST = {
    "cuda": ("clip-image", "clip-1-crop", "mixtral-train", "connector-8", "mixtral-decode16"),
    "cpu": ("clip-1-crop", "connector-1", "mixtral-quarter"),
}
REST = {
    "cuda": (
        "clip-batch4", "mixtral-prefill", "mixtral-decode1", "clip-batch8", "connector-1", "qwen3-30b-a3b",
        "olmoe-7b", "clip-scale3", "clip-batch2", "connector-4", "connector-32", "mixtral-decode64",
        "mixtral-train2",
    ),
    "cpu": (),
}  # fmt: skip


def chosen(device: str, full: bool) -> list[Shape]:
    return [SHAPES[name] for name in FIRST[device] + (REST[device] if full else ())]
