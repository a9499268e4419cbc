"""Use of cumo_kernels in the original CuMo code, with one line in an existing training script:

    model = patch_original(model)        # after the script has built the model (and patched its Mixtral)

Modules, parameters, their names, optimizers and checkpoints do not change. Only the forward of each sparse
layer is replaced. The weights of the experts of a layer are stored in one tensor, which the kernels read.
The parameters of the original become views of this tensor, so no weight is stored twice.
"""

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cumo_kernels import expert_mlp, route
from cumo_kernels.integrations.transformers import GATED, PLAIN
from cumo_model.model.losses import load_balancing_loss, router_z_loss
from cumo_model.model.moe import is_untouched
from cumo_model.model.recording import RoutingRecord, note_routing

log = logging.getLogger(__name__)

# class of a sparse layer -> first linear layer, second linear layer and activation of its experts
LINEARS = {
    "CLIPEncoderMoELayer": (("fc1",), "fc2", "activation_fn"),
    "MLPMoE": (("0",), "2", "1"),
    "MixtralSparseMoeBlock": (("w1", "w3"), "w2", "act_fn"),
}
PLACE = {"CLIPEncoderMoELayer": "clip", "MLPMoE": "mlp", "MixtralSparseMoeBlock": "llm"}


class _Whole(torch.autograd.Function):
    """Returns the tensor whose consecutive rows are the parts; backward splits its gradient among them."""

    @staticmethod
    def forward(ctx, whole: Tensor, *parts: Tensor) -> Tensor:
        ctx.sizes = [len(part) for part in parts]
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, *grad.flatten(0, 1).split(ctx.sizes)


class SharedWeights:
    """E parameters (or E pairs, concatenated on rows) of the original as one (E, ...) tensor without a copy.

    If the parameters are later moved (by a change of device or dtype, or by an optimizer that flattens
    them), they are stacked again in each forward. The result is the same, but each forward makes a copy.
    """

    def __init__(self, parts: Sequence[nn.Parameter], num_experts: int):
        self.num_experts = num_experts
        shapes = {part.shape[1:] for part in parts}
        assert len(shapes) == 1, shapes
        with torch.no_grad():
            self.whole = torch.cat([part.detach() for part in parts]).unflatten(0, (num_experts, -1))
            rows = self.whole.flatten(0, 1).split([len(part) for part in parts])
            for part, row in zip(parts, rows, strict=True):
                part.data = row
        self.places = [part.data_ptr() for part in parts]

    def __call__(self, parts: Sequence[nn.Parameter]) -> Tensor:
        if self.whole is not None and [part.data_ptr() for part in parts] == self.places:
            return _Whole.apply(self.whole, *parts)
        self.whole = None  # the parameters are no longer views of it
        return torch.cat(list(parts)).unflatten(0, (self.num_experts, -1))


class _Forward:
    """The forward of one sparse layer of the original model, computed with cumo_kernels.

    It stores the layer, and tensors of weights only in `shared`, which is not copied or pickled. A deep copy
    or an unpickled layer has its own parameters; it fills `shared` when it first runs.
    """

    def __init__(self, layer: nn.Module, index: int, compat: str | None):
        self.layer, self.index = layer, index
        kind = type(layer).__name__
        self.ups, self.down, act = LINEARS[kind]
        self.compat = compat if compat is None or kind != "MixtralSparseMoeBlock" else "cumo_llm"
        # the original training code replaces the forward of Mixtral blocks by one that returns both losses
        self.original = vars(layer).get("forward")
        if reason := self.foreign():
            raise ValueError(f"the experts of {kind} must be made of plain nn.Linear, got {reason}")
        first = layer.experts[0].get_submodule(act)
        name = PLAIN.get(type(first))
        self.activation = GATED.get(name) if len(self.ups) == 2 else name
        if self.activation is None:
            raise ValueError(
                f"the experts of {kind} must have an activation that cumo_kernels supports, "
                f"got {type(first).__name__}"
            )
        self.shared: dict[tuple[str, str], SharedWeights] = {}
        self.share()

    def __getstate__(self):
        return vars(self) | {"shared": {}}

    def foreign(self) -> str | None:
        """Describe the first linear layer of the experts that is not a plain nn.Linear, or None.

        LoRA replaces the module; hooks and offloading replace or surround its forward.
        """
        for number, expert in enumerate(self.layer.experts):
            for path in (*self.ups, self.down):
                found = expert.get_submodule(path)
                if type(found) is not nn.Linear:
                    return f"{type(found).__module__}.{type(found).__name__} as experts.{number}.{path}"
                if not is_untouched(found):
                    return f"hooks or a replaced forward of experts.{number}.{path}"
        return None

    def parts(self, paths: Sequence[str], name: str) -> list[nn.Parameter | None]:
        return [getattr(e.get_submodule(path), name) for e in self.layer.experts for path in paths]

    def share(self) -> None:
        for paths in (self.ups, (self.down,)):
            for name in ("weight", "bias"):
                parts = self.parts(paths, name)
                if parts[0] is not None:
                    self.shared[paths[0], name] = SharedWeights(parts, len(self.layer.experts))

    def weights(self, paths: Sequence[str], name: str) -> Tensor | None:
        parts = self.parts(paths, name)
        return None if parts[0] is None else self.shared[paths[0], name](parts)

    def __call__(self, x: Tensor):
        if reason := self.foreign():
            _say_once(
                f"cumo_model.patch_original: {type(self.layer).__name__} computes as before the patch, "
                f"because of {reason}"
            )
            return type(self.layer).forward(self.layer, x) if self.original is None else self.original(x)
        if not self.shared:
            self.share()
        return FORWARDS[type(self.layer).__name__](self, x)

    def compute(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (..., H) -> output (..., O), balance loss, z-loss, router logits (T, E)."""
        layer, kind = self.layer, type(self.layer).__name__
        rows = x.reshape(-1, x.shape[-1])
        logits = layer.gate(rows)
        top_k = layer.top_k if kind == "MixtralSparseMoeBlock" else layer.num_selected
        routing = route(logits, top_k, groups=groups, compat=self.compat)
        note_routing(RoutingRecord(PLACE[kind], self.index, routing, logits))
        up, up_bias = (self.weights(self.ups, name) for name in ("weight", "bias"))
        down, down_bias = (self.weights((self.down,), name) for name in ("weight", "bias"))
        out = expert_mlp(rows, routing, up, down, up_bias, down_bias, self.activation)
        out = out.view(*x.shape[:-1], out.shape[-1])
        return out, load_balancing_loss(routing.stats), router_z_loss(routing.stats), logits


@functools.cache
def _say_once(text: str) -> None:
    log.warning(text)


def _clip(forward: _Forward, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    layer = forward.layer
    hidden_states = hidden_states + layer.self_attn(layer.layer_norm1(hidden_states))
    out, balance, z, _ = forward.compute(layer.layer_norm2(hidden_states), hidden_states.shape[0])
    return hidden_states + out, balance, z


def _connector(forward: _Forward, x_img: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return forward.compute(x_img, x_img.shape[0])[:3]


def _mixtral(forward: _Forward, hidden_states: Tensor):
    out, balance, z, logits = forward.compute(hidden_states, 1)
    return out, (logits if forward.original is None else (balance, z))


FORWARDS = {
    "CLIPEncoderMoELayer": _clip,
    "MLPMoE": _connector,
    "MixtralSparseMoeBlock": _mixtral,
}


def patch_original(model: nn.Module, compat: str | None = None) -> nn.Module:
    """Make the sparse layers of an original CuMo model compute with cumo_kernels, in place.

    The layers are found by class name: CLIPEncoderMoELayer, MLPMoE, and MixtralSparseMoeBlock with one
    module per expert. Their return values do not change: output, balance loss and z-loss, or output and
    router logits for a Mixtral block that the original training code has not patched. The losses are fp32.
    If modules of the experts are later replaced by other classes than nn.Linear, as LoRA does, the layer
    computes as before the patch and logs a warning.

    Args:
        model: a model of the original code, or any module that contains such layers. Patching a second time
            has no effect.
        compat: "cumo" rounds in the routers as the original code does; None computes them in fp32.

    Returns:
        `model` itself.

    Raises:
        ValueError: the model has no such layer; a parameter is empty because ZeRO-3 has sharded it (patch
            before sharding); an expert is not made of plain nn.Linear (LoRA, quantised); or an activation is
            unknown.
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
        layer.forward = _Forward(layer, counts[kind], compat)
        layer.is_patched_by_cumo = True
        layer._z3_leaf = True  # DeepSpeed ZeRO-3 then gathers the experts' parameters for this module
        counts[kind] += 1
    return model
