"""Gradients of a model in the form that `tests.rounding` compares."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

BIAS = ".k_proj.bias"


def gradients(model: nn.Module, found: Sequence[Tensor | None] | None = None) -> dict[str, Tensor | None]:
    """Gradients by parameter name; `found`, if given, lists them in the order of the parameters."""
    named = list(model.named_parameters())
    grads = [parameter.grad for _, parameter in named] if found is None else found
    return beside_weights({name: grad for (name, _), grad in zip(named, grads, strict=True)})


def beside_weights(named: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Join the tensor of each key projection's bias to that of its weight, as an additional column.

    The bias shifts all scores of a query equally, so its exact gradient is zero and its computed gradient is
    only rounding error. It can be compared only relative to the weight. Works for gradients and for trained
    parameters.
    """
    out = dict(named)
    for name in [name for name in named if name.endswith(BIAS)]:
        weight = f"{name.removesuffix('bias')}weight"
        bias = out.pop(name)
        assert (bias is None) == (out[weight] is None), name
        if bias is not None:
            out[weight] = torch.cat([out[weight], bias[:, None]], 1)
    return out
