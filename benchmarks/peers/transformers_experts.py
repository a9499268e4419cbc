"""Two experts implementations of transformers, selected in a model by `experts_implementation=`.

Each is a module with transformers' own decorator, as in its models; the weights of a call replace the
module's parameters, since they need gradients.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.cases.shapes import Shape
from cumo_kernels import Routing


def make(name: str, shape: Shape, routing: Routing) -> Callable[..., Tensor]:
    """-> the implementation `name` as a layer; it makes its plan from the top-k indices in every call."""
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import use_experts_implementation

    first = "gate_up_proj" if shape.is_gated else "up_proj"
    names = (first, "down_proj", f"{first}_bias", "down_proj_bias")

    @use_experts_implementation(has_gate=shape.is_gated, has_bias=shape.bias)
    class Experts(torch.nn.Module):
        def __init__(self, config: SimpleNamespace):
            super().__init__()
            self.num_experts = shape.E
            self.act_fn = ACT2FN["silu" if shape.activation == "swiglu" else shape.activation]
            for key in names:
                self.register_parameter(key, torch.nn.Parameter(torch.empty(0)))

        def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
            raise NotImplementedError(f"transformers has no experts implementation {name!r}")

    experts, indices = Experts(SimpleNamespace(_experts_implementation=name)), routing.topk_indices.long()

    def layer(x: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        put = dict(zip(names, parameters, strict=False))
        return torch.func.functional_call(experts, put, (x, indices, weights))

    return layer


def copied_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Weights that batched_mm copies, an expert's for every slot, and their gradients."""
    return 2 * shape.slots * (shape.weights // shape.E) * dtype.itemsize
