"""Gradients of a model as `tests.rounding` compares them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

BIAS = ".k_proj.bias"


def gradients(model: nn.Module, found: Sequence[Tensor | None] | None = None) -> dict[str, Tensor | None]:
    """By name: those at the parameters, or `found`, in the order of the parameters."""
    named = list(model.named_parameters())
    grads = [parameter.grad for _, parameter in named] if found is None else found
    return beside_weights({name: grad for (name, _), grad in zip(named, grads, strict=True)})


def beside_weights(named: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The gradient of a key's bias as one more column of its weight's; or what training made of both.

    It moves all scores of a query alike, so its gradient is rounding and nothing else, for which there is no
    measure in itself.
    """
    out = dict(named)
    for name in [name for name in named if name.endswith(BIAS)]:
        weight = f"{name.removesuffix('bias')}weight"
        bias = out.pop(name)
        assert (bias is None) == (out[weight] is None), name
        if bias is not None:
            out[weight] = torch.cat([out[weight], bias[:, None]], 1)
    return out
