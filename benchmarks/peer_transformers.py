"""Two experts implementations of transformers: what a model runs under `experts_implementation=`.

The function is the registered one. It gets its experts module as `self`; here that is an object with the same
attributes and the weights of the call, since gradients must reach those.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.shapes import Shape
from cumo_kernels import Routing


def make(name: str, shape: Shape, routing: Routing) -> Callable[..., Tensor]:
    """-> the implementation `name` as a layer; it makes its plan from the choices anew in every call."""
    from transformers.activations import ACT2FN
    from transformers.integrations import moe

    forward, indices = moe.ALL_EXPERTS_FUNCTIONS[name], routing.topk_indices.long()
    activation = ACT2FN["silu" if shape.activation == "swiglu" else shape.activation]
    first = "gate_up_proj" if shape.is_gated else "up_proj"

    def layer(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
        experts = SimpleNamespace(
            num_experts=shape.E, has_gate=shape.is_gated, has_bias=bool(biases), is_transposed=False,
            act_fn=activation, down_proj=down, **{first: up},
        )  # fmt: skip
        experts._apply_gate = partial(moe._default_apply_gate, experts)
        if biases:
            setattr(experts, f"{first}_bias", biases[0])
            experts.down_proj_bias = biases[1]
        return forward(experts, x, indices, weights)

    return layer


def copied_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Weights that batched_mm copies, an expert's for every slot, and their gradients."""
    return 2 * shape.slots * (shape.weights // shape.E) * dtype.itemsize
