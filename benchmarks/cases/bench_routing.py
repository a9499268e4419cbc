"""route: python -m benchmarks.cases.bench_routing [--shape NAME] [--backend NAME] [--full]

Hidden states and gate in; weights, sort and loss statistics out.
"""

import torch

from benchmarks.cases.shapes import Shape, chosen
from benchmarks.harness import Case, Workload, main
from cumo_kernels import ops
from cumo_kernels.backends import reference

OP = "route"


def cases(device: str, full: bool) -> list[Case]:
    # the gate in fp32: bf16 logits have ties that fp64 logits do not, so fp64 would be no reference
    dtypes = ("bf16", "fp32") if device == "cuda" else ("fp32",)
    return [Case(shape, dtype, gate_dtype="fp32") for shape in chosen(device, full) for dtype in dtypes]


def _plain(shape: Shape, x: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, ...]:
    logits = (x @ gate.T).float()
    probs = logits.softmax(-1)
    values, indices = probs.topk(shape.K, dim=-1)
    torch.argsort(indices.flatten(), stable=True)
    weights = values / values.sum(-1, keepdim=True)
    z = logits.logsumexp(-1).square().view(shape.groups, -1).mean(1)
    return weights, probs.view(shape.groups, -1, shape.E).mean(1), z


def setup(shape: Shape, dtype: torch.dtype, device: str, pattern: str) -> Workload:
    x = torch.randn(shape.T, shape.H, dtype=dtype, device=device)
    gate = torch.randn(shape.E, shape.H, dtype=dtype, device=device) / shape.H**0.5

    def run(x, gate):
        routing = ops.route(x, shape.K, gate, groups=shape.groups)
        return routing.topk_weights, routing.stats.mean_probs, routing.stats.mean_squared_logsumexp

    size = x.element_size()
    plan = 4 * (2 * shape.slots + 2 * shape.slots)  # weights and ids, permutation and its inverse
    return Workload(
        run=run,
        reference=lambda x, w: reference.route(x, w, None, shape.groups, shape.K, True)[::2],
        inputs=(x, gate),
        flops=2 * shape.T * shape.H * shape.E,
        bytes=size * (x.numel() + gate.numel()) + plan,
        backward_flops=4 * shape.T * shape.H * shape.E,
        backward_bytes=2 * size * (x.numel() + gate.numel()) + 4 * 2 * shape.slots,
        peers={"torch-plain": lambda x, w: _plain(shape, x, w)},
    )


if __name__ == "__main__":
    raise SystemExit(main(__name__))
