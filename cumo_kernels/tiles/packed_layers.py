"""Layers with packed weights and adapters, for ahead-of-time compilation, and the bytes that they read.

Mixtral's layer in each format, with an adapter of rank 16 where it is trained, at the sizes of decoding and
prefill. "llm-lora" has plain weights and the adapter.
"""

from collections.abc import Callable, Iterator

import torch

from cumo_kernels.packing.formats import FORMATS
from cumo_kernels.tiles import problems

RANK = 16
WEIGHTS = ("lora", *FORMATS, "int4z")  # int4z: int4 with zero points
SHAPES = {f"llm-{name}": (*problems.SHAPES["llm"][:6], (1, 64, 4096)) for name in WEIGHTS}
EVERY_DTYPE = "llm-nf4"


def calls(shape: str, num_tokens: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every op of one layer, forward and backward, on meta tensors: name and call."""
    from cumo_kernels.backends.triton import adapted

    H, I, O, E, K, _, _ = SHAPES[shape]
    T, S, name = num_tokens, num_tokens * K, shape.removeprefix("llm-")
    meta = lambda *size, dtype=dtype: torch.empty(size, dtype=dtype, device="meta")
    ints = lambda *size: meta(*size, dtype=torch.int32)
    form = None if name == "lora" else name.removesuffix("z")

    def weight(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if form is None:
            return meta(E, rows, columns), None, None
        row = FORMATS[form]
        groups = (E, rows, columns // row.group)
        zeros = meta(*groups, dtype=torch.uint8) if name == "int4z" else None
        return meta(E, rows, columns // 2, dtype=torch.uint8), meta(*groups, dtype=row.scales[0]), zeros

    up, down = weight(2 * I, H), weight(O, I)
    plan = (meta(T, K, dtype=torch.float32), ints(S), ints(S), ints(E + 1))
    layer = (meta(T, H), *plan, *up, *down, None, None)
    nothing, thin = (None,) * 4, (meta(E, RANK, H), meta(E, 2 * I, RANK), meta(E, RANK, I), meta(E, O, RANK))
    common = (form, form, "swiglu")
    if form is not None:
        gemm = adapted.packed_grouped_gemm
        rest = (ints(E + 1), None, None, None, K, None)
        yield "packed_grouped_gemm", lambda: gemm(meta(S, H), *up, form, False, *rest)
        yield "packed_grouped_gemm, transposed", lambda: gemm(meta(S, 2 * I), *up, form, True, *rest)
        yield (
            "adapted_expert_mlp, none",
            lambda: adapted.adapted_expert_mlp(*layer, *nothing, *common, "none"),
        )
    yield "adapted_expert_mlp, adapter", lambda: adapted.adapted_expert_mlp(*layer, *thin, *common, "preact")
    if T > 1:
        kept = (meta(S, 2 * I), meta(0), meta(S, RANK), meta(S, RANK))
        yield (
            "adapted_expert_mlp backward",
            lambda: adapted.adapted_expert_mlp_backward(
                meta(T, O), *layer, *thin, *kept, *common, "preact", "1100001111"
            ),
        )


def weight_bytes(
    rows: int,
    columns: int,
    format: str | None = None,
    group: int | None = None,
    scale_dtype: torch.dtype | None = None,
    zeros: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes of one expert's weight (rows, columns), each of which a product of few rows reads once.

    Args:
        rows: outputs.
        columns: inputs, along which a packed weight has its groups.
        format: a name of FORMATS; None: a plain weight of `dtype`.
        group: None: the format's.
        scale_dtype: None: the format's first.
        zeros: whether there are zero points, stored as a byte each.
        dtype: of a plain weight.
    """
    if format is None:
        return rows * columns * dtype.itemsize
    row = FORMATS[format]
    groups = rows * columns // (group or row.group)
    return rows * columns // 2 + groups * ((scale_dtype or row.scales[0]).itemsize + zeros)


def decode_bytes(shape: str = "llm", num_tokens: int = 1, **weights) -> int:
    """Bytes of weights that a layer reads for `num_tokens` tokens, each with experts of its own if there are.

    Args:
        shape: a name in problems.SHAPES.
        num_tokens: T.
        weights: keyword arguments of `weight_bytes`.
    """
    hidden, intermediate, output, experts, top_k, gated, _ = problems.SHAPES[shape]
    hit = min(experts, num_tokens * top_k)
    up = weight_bytes(intermediate * (1 + gated), hidden, **weights)
    return hit * (up + weight_bytes(output, intermediate, **weights))
