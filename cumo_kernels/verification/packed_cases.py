"""Calls of the ops with packed weights and adapters, for cases.py.

The reference multiplies by the dequantised weights in the dtype of the rows: what the format rounds away is
no error of a kernel. H and I, along which weights are packed, are rounded up to a multiple of BLOCK.
"""

from collections.abc import Callable
from zlib import crc32

import torch
from torch import Tensor

from cumo_kernels import ops
from cumo_kernels.activations import get_activation
from cumo_kernels.backends import reference
from cumo_kernels.packing.formats import FORMATS
from cumo_kernels.packing.tensor import PackedWeight, pack
from cumo_kernels.types import Adapter, Routing

BLOCK = 32  # the shortest group
WEIGHTS = ("plain", *FORMATS, "int4z")  # int4z: int4 with zero points
RANKS = (16, 3, 0, 33)  # of the families' cases, in turn
# other scales than the default, so that all dtypes occur
SCALES = {"fp4": torch.float16, "int4": torch.bfloat16}
OPS = ("packed_grouped_gemm", "adapted_expert_mlp")
Parts = tuple[Callable, Callable, tuple[Tensor, ...]]  # run, reference, inputs


def in_turn(op: str, family: str, number: int) -> dict[str, str | int]:
    """Weights and rank of the case of a family with this number."""
    if op not in OPS:
        return {}
    number += crc32(family.encode())  # whatever families there are beside it
    if op == "packed_grouped_gemm":
        return {"weights": WEIGHTS[1 + number % (len(WEIGHTS) - 1)]}
    weights, rank = WEIGHTS[number % len(WEIGHTS)], RANKS[number // 2 % len(RANKS)]
    return {"weights": weights, "rank": rank or 16 * (weights == "plain")}


def _whole(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def packed(weight: Tensor, name: str) -> PackedWeight:
    """`weight` in the format called `name`, in the longest groups that fit."""
    row = FORMATS[name.removesuffix("z")]
    group = max(length for length in row.groups if weight.shape[2] % length == 0)
    return pack(weight, row.name, group, name != "int4z", SCALES.get(name))


def grouped_gemm_parts(case, draw: Callable, place: Callable, routing: Routing) -> Parts:
    """`grouped_gemm` with a packed weight, of a Case."""
    H, width = _whole(case.H), _whole(case.I) * (1 + get_activation(case.activation).is_gated)
    weight = packed(draw(case.E, width, H) / H**0.5, case.weights)
    plan = (routing.permutation, routing.inverse_permutation) if case.gated else (None, None)
    dtype = weight.dtype
    rows = case.T if case.gated else case.T * case.K
    biases = (draw(case.E, width),) if case.bias else ()

    def run(x: Tensor, b: Tensor | None = None) -> Tensor:
        return ops.grouped_gemm(
            place(x), weight, routing.expert_offsets, bias=b, gather=routing if case.gated else None,
            activation=case.activation,
        )  # fmt: skip

    def expected(x: Tensor, b: Tensor | None = None) -> Tensor:
        plain = weight.dequantize(dtype).to(x.dtype)
        return reference.grouped_gemm(x, plain, routing.expert_offsets, b, *plan, case.K, case.activation)[0]

    return run, expected, (draw(rows, H), *biases)


def expert_mlp_parts(case, draw: Callable, place: Callable, routing: Routing) -> Parts:
    """`expert_mlp` with packed weights, adapters or both, of a Case; plain weights are inputs."""
    H, I, O, E, R = _whole(case.H), _whole(case.I), case.O, case.E, case.rank
    width = I * (1 + get_activation(case.activation).is_gated)
    weights = [draw(E, width, H) / H**0.5, draw(E, O, I) / I**0.5]
    inputs = [draw(case.T, H), routing.topk_weights]
    kept: list[PackedWeight] = []
    if case.weights == "plain":
        inputs += weights
    else:
        kept = [packed(weight, case.weights) for weight in weights]
    dtype = weights[0].dtype
    inputs += [draw(E, width), draw(E, O)] if case.bias else []
    if R:
        inputs += [draw(E, R, H) / H**0.5, draw(E, width, R) / R**0.5]
        inputs += [draw(E, R, I) / I**0.5, draw(E, O, R) / R**0.5]

    def named(rest: tuple[Tensor, ...]) -> tuple[list[Tensor], list, list]:
        """-> plain weights, both biases, the adapters' tensors."""
        rest = list(rest)
        plain = [] if kept else [rest.pop(0), rest.pop(0)]
        return plain, [rest.pop(0), rest.pop(0)] if case.bias else [None, None], rest or [None] * 4

    def run(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        plain, biases, (up_a, up_b, down_a, down_b) = named(rest)
        return ops.expert_mlp(
            place(x), ops.routing_from_topk(w, routing.topk_indices, E), *(kept or plain), *biases,
            activation=case.activation, memory=case.memory,
            up_adapters=[Adapter(up_a, up_b)] if R else [],
            down_adapters=[Adapter(down_a, down_b)] if R else [],
        )  # fmt: skip

    def expected(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        plain, biases, thin = named(rest)
        up, down = plain or (weight.dequantize(dtype).to(x.dtype) for weight in kept)
        return reference.adapted_expert_mlp(
            x, w, routing.permutation, routing.inverse_permutation, routing.expert_offsets,
            up, None, None, down, None, None, *biases, *thin, None, None, case.activation, "none",
        )[0]  # fmt: skip

    return run, expected, tuple(inputs)


PARTS = dict(zip(OPS, (grouped_gemm_parts, expert_mlp_parts), strict=True))
