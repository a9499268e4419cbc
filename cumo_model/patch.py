"""Our kernels inside the original CuMo code: one line in a training script that is there already.

    model = patch_original(model)        # after the script has built it (and patched its Mixtral)

The modules and their parameters stay, with names, optimizers and checkpoints; only the forward of each sparse
layer changes. The weights of a layer's experts move into one tensor that the kernels read, of which the
original's parameters become parts, so neither side holds a copy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cumo_kernels import expert_mlp, route
from cumo_kernels.integrations.transformers import GATED, PLAIN
from cumo_model.losses import load_balancing_loss, router_z_loss
from cumo_model.moe import note_routing

LINEARS = {  # class of a sparse layer -> in each of its experts: first linear layer, second, activation
    "CLIPEncoderMoELayer": (("fc1",), "fc2", "activation_fn"),
    "MLPMoE": (("0",), "2", "1"),
    "MixtralSparseMoeBlock": (("w1", "w3"), "w2", "act_fn"),
}
PLACE = {"CLIPEncoderMoELayer": "clip", "MLPMoE": "mlp", "MixtralSparseMoeBlock": "llm"}


class _Whole(torch.autograd.Function):
    """The tensor whose consecutive rows the parts are; its gradient goes to the parts, row by row."""

    @staticmethod
    def forward(ctx, whole: Tensor, *parts: Tensor) -> Tensor:
        ctx.sizes = [len(part) for part in parts]
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx, grad: Tensor):
        pieces = grad.flatten(0, 1).split(ctx.sizes)
        needed = ctx.needs_input_grad[1:]
        return None, *(piece if need else None for piece, need in zip(pieces, needed, strict=True))


class SharedWeights:
    """E parameters (or E pairs, joined on rows) of the original as one (E, ...) tensor without a copy.

    When something moved the parameters (a device, a dtype, an optimizer that flattens them), they are stacked
    anew in every forward: right, but a copy.
    """

    def __init__(self, parts: Sequence[nn.Parameter], num_experts: int):
        self.parts, self.num_experts = list(parts), num_experts
        shapes = {part.shape[1:] for part in self.parts}
        assert len(shapes) == 1, shapes
        with torch.no_grad():
            self.whole = torch.cat([part.detach() for part in self.parts]).unflatten(0, (num_experts, -1))
            rows = self.whole.flatten(0, 1).split([len(part) for part in self.parts])
            for part, row in zip(self.parts, rows, strict=True):
                part.data = row
        self.places = [part.data_ptr() for part in self.parts]

    @property
    def is_shared(self) -> bool:
        return all(part.data_ptr() == place for part, place in zip(self.parts, self.places, strict=True))

    def __call__(self) -> Tensor:
        if self.is_shared:
            return _Whole.apply(self.whole, *self.parts)
        self.whole = None  # whatever it was, the parameters have left it
        return torch.cat(self.parts).unflatten(0, (self.num_experts, -1))


class _Kernels:
    """What one sparse layer of the original computes, on our kernels."""

    def __init__(self, layer: nn.Module, index: int, compat: str | None):
        kind = type(layer).__name__
        ups, down, act = LINEARS[kind]
        experts = list(layer.experts)
        name = PLAIN.get(type(experts[0].get_submodule(act)))
        self.activation = GATED.get(name) if len(ups) == 2 else name
        if self.activation is None:
            raise ValueError(
                f"the experts of {kind} must have an activation that cumo_kernels knows, "
                f"got {type(experts[0].get_submodule(act)).__name__}"
            )
        self.gate, self.place, self.index = layer.gate, PLACE[kind], index
        self.top_k = layer.top_k if kind == "MixtralSparseMoeBlock" else layer.num_selected
        self.compat = compat if compat is None or kind != "MixtralSparseMoeBlock" else "cumo_llm"
        count = len(experts)

        def shared(paths: Sequence[str], parameter: str) -> SharedWeights | None:
            found = [getattr(e.get_submodule(path), parameter) for e in experts for path in paths]
            return None if found[0] is None else SharedWeights(found, count)

        self.up, self.up_bias = shared(ups, "weight"), shared(ups, "bias")
        self.down, self.down_bias = shared((down,), "weight"), shared((down,), "bias")

    def __call__(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (..., H) -> output (..., O), balance loss, z loss, router logits (T, E)."""
        rows = x.reshape(-1, x.shape[-1])
        logits = self.gate(rows)
        routing = route(logits, self.top_k, groups=groups, compat=self.compat)
        note_routing(self.place, self.index, routing)
        up_bias, down_bias = (None if b is None else b() for b in (self.up_bias, self.down_bias))
        out = expert_mlp(rows, routing, self.up(), self.down(), up_bias, down_bias, self.activation)
        out = out.view(*x.shape[:-1], out.shape[-1])
        return out, load_balancing_loss(routing.stats), router_z_loss(routing.stats), logits


def _clip_forward(layer: nn.Module, kernels: _Kernels):
    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden_states = hidden_states + layer.self_attn(layer.layer_norm1(hidden_states))
        out, balance, z, _ = kernels(layer.layer_norm2(hidden_states), hidden_states.shape[0])
        return hidden_states + out, balance, z

    return forward


def _connector_forward(layer: nn.Module, kernels: _Kernels):
    def forward(x_img: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return kernels(x_img, x_img.shape[0])[:3]

    return forward


def _mixtral_forward(layer: nn.Module, kernels: _Kernels):
    # the original's training replaces the forward of each block by one that returns the two losses
    with_losses = "forward" in vars(layer)

    def forward(hidden_states: Tensor):
        out, balance, z, logits = kernels(hidden_states, 1)
        return out, ((balance, z) if with_losses else logits)

    return forward


FORWARDS = {
    "CLIPEncoderMoELayer": _clip_forward,
    "MLPMoE": _connector_forward,
    "MixtralSparseMoeBlock": _mixtral_forward,
}


def patch_original(model: nn.Module, compat: str | None = None) -> nn.Module:
    """Let the sparse layers of an original CuMo model compute with cumo_kernels, in place.

    Found by class name: CLIPEncoderMoELayer, MLPMoE, and MixtralSparseMoeBlock with a module per expert. They
    go on returning what they returned: output, balance loss, z loss (a Mixtral block that the original's
    training has not patched: output, router logits). The losses are fp32.

    Args:
        model: the original's model, or any module that holds such layers. Patching twice changes nothing.
        compat: "cumo" rounds in the routers as the original does, None keeps them in fp32.

    Returns:
        `model` itself.

    Raises:
        ValueError: there is nothing to patch, a parameter is not all there (ZeRO-3 has sharded it: patch
            before), or an activation is unknown.
    """
    if compat not in (None, "cumo"):
        raise ValueError(f"compat must be None or 'cumo', got {compat!r}")
    layers = [
        (name, m)
        for name, m in model.named_modules()
        if type(m).__name__ in FORWARDS and isinstance(getattr(m, "experts", None), nn.ModuleList)
    ]
    if not layers:
        raise ValueError(
            f"model must hold sparse layers of the original CuMo ({', '.join(FORWARDS)}), "
            f"got a {type(model).__name__} without one"
        )
    counts = dict.fromkeys(FORWARDS, 0)
    for name, layer in layers:
        kind = type(layer).__name__
        if getattr(layer, "is_patched_by_cumo", False):
            continue
        empty = next((key for key, p in layer.named_parameters() if p.numel() == 0), None)
        if empty is not None:
            raise ValueError(
                f"model must be patched before its parameters are sharded: {name}.{empty} is empty"
            )
        layer.forward = FORWARDS[kind](layer, _Kernels(layer, counts[kind], compat))
        layer.is_patched_by_cumo = True
        layer._z3_leaf = True  # DeepSpeed ZeRO-3 then gathers the experts for this module, not for their own
        counts[kind] += 1
    return model
