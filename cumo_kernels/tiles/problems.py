"""The GEMMs of CuMo's layers as Problems, and a way to run or compile each of them alone."""

from collections.abc import Callable, Iterator

import torch

from cumo_kernels.tiles import tuning
from cumo_kernels.tiles.tuning import Config, Problem

SHAPES = {  # hidden, intermediate, output size, experts, top_k, gated, numbers of tokens
    "clip": (1024, 4096, 1024, 4, 2, False, (577, 4616, 41544)),
    "mlp": (2048, 4096, 4096, 4, 2, False, (576, 2304, 18432)),
    "llm": (4096, 14336, 4096, 8, 2, True, (1, 16, 64, 512, 4096, 16384)),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def layer_problems(
    shape: str, num_tokens: int, dtype: torch.dtype, has_tma: bool = True
) -> Iterator[Problem]:
    """The six GEMMs of one expert layer: two forward, four backward.

    With many rows and a copy engine the rows are a sorted copy, else they are gathered.
    """
    from cumo_kernels.backends.triton.experts import SORT_FROM

    hidden, intermediate, output, experts, top_k, gated, _ = SHAPES[shape]
    width = intermediate * (1 + gated)
    rows = tuning.bucket(num_tokens * top_k)
    gathered = num_tokens * top_k < SORT_FROM or not has_tma
    yield Problem("gemm", dtype, rows, intermediate, hidden, experts, gated, gathered)
    yield Problem("gemm", dtype, rows, output, intermediate, experts, can_split=True)
    yield Problem("grad_hidden", dtype, rows, intermediate, output, experts, gated, gathered)
    yield Problem(
        "weight_grad", dtype, rows, output, intermediate, experts, gathered=gathered, can_split=True
    )
    yield Problem("weight_grad", dtype, rows, width, hidden, experts, gathered=gathered, can_split=True)
    yield Problem("gemm", dtype, rows, hidden, width, experts, can_split=True)


def launcher(
    problem: Problem, device: str | torch.device, activation: str | None = None, transposed: bool = False
) -> Callable[[Config | None], object]:
    """A function that runs `problem` once with a config (None: the chosen one), on balanced random data.

    Gathered rows belong to half as many tokens, as with CuMo's two experts per token. On the meta device
    nothing runs, for ahead-of-time compilation. `transposed` stores the weight with its inputs and
    outputs exchanged, as the input gradient reads it.
    """
    from cumo_kernels.backends.triton.grad_hidden import launch_grad_hidden
    from cumo_kernels.backends.triton.grouped_gemm import launch_gemm
    from cumo_kernels.backends.triton.weight_grad import launch_weight_grad

    rows, n, k, experts = problem.rows, problem.n, problem.k, problem.experts
    draw = lambda *size: torch.randn(size, device=device, dtype=problem.dtype)
    integers = lambda values: values.to(device=device, dtype=torch.int32)
    offsets = integers(torch.arange(experts + 1) * rows // experts)
    # stable within an expert, like a sort by expert: neighbours in x stay neighbours
    parts = torch.randperm(rows).tensor_split((torch.arange(experts + 1) * rows // experts)[1:-1])
    permutation = integers(torch.cat([part.sort().values for part in parts]))
    order = permutation if problem.gathered else None
    top_k = 2 if problem.gathered and rows % 2 == 0 else 1
    tokens = rows // top_k
    if problem.kind == "gemm":
        name = activation or ("swiglu" if problem.gated else None if problem.can_split else "quick_gelu")
        width = n * (1 + problem.gated)
        x, biases = draw(tokens, k), None if transposed else draw(experts, width)
        weight = draw(experts, k, width).transpose(1, 2) if transposed else draw(experts, width, k)
        return lambda config: launch_gemm(
            x, weight, offsets, biases, order, top_k, name,
            keep_pre=name is not None, zero_tail=False, config=config,
        )  # fmt: skip
    weights = torch.rand(tokens, top_k, device=device)
    if problem.kind == "grad_hidden":
        name = activation or ("swiglu" if problem.gated else "quick_gelu")
        grad, weight, z = draw(tokens, k), draw(experts, k, n), draw(rows, n * (1 + problem.gated))
        weights = torch.rand(rows // 2, 2, device=device) if rows % 2 == 0 else weights
        return lambda config: launch_grad_hidden(
            grad, weights, permutation, offsets, weight, z, name,
            need_dz=True, need_weighted=True, need_dots=True, is_sorted=not problem.gathered, config=config,
        )  # fmt: skip
    # the gradient of down_proj, whose output is the narrower side, gathers its gradient and has no bias
    gather = "grad" if n < k else "x"
    grad, x = draw(tokens if gather == "grad" else rows, n), draw(tokens if gather == "x" else rows, k)
    return lambda config: launch_weight_grad(
        grad, x, offsets, order, top_k, gather == "x", gather=gather, config=config
    )
