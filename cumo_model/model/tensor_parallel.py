"""Tensor parallelism of transformers: `from_pretrained(path, tp_plan="auto")` under torchrun.

    attention, dense MLPs    as in transformers: columns of the first layer, rows of the second
    experts                  each of n ranks has I/n of the I inner features of every expert; the sum of the
                             ranks' outputs is the output
    everything else          replicated: embeddings, norms, gates, head

Every rank has the same tokens, gates and routing. Only the sums over I and over heads are split, so results
agree with those of one process up to the order of these sums.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention

from cumo_kernels import Routing
from cumo_kernels.activations import get_activation
from cumo_model.model.mlp_moe import DenseMLP
from cumo_model.model.moe import Experts, MoELayer

STYLE = "cumo_experts"  # the name of ExpertsParallel in plans
MLP = {"fc1": "colwise", "fc2": "rowwise"}
RULES = {  # class of a module -> the styles of its parts; "" is the module itself
    CLIPAttention: {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "out_proj": "rowwise"},
    CLIPMLP: MLP,
    DenseMLP: MLP,
    Experts: {"": STYLE},
}


class _SumGradients(Function):
    """Returns x; in backward the gradients of all ranks are added."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumOutputs(Function):
    """Adds x of all ranks; in backward each rank gets the gradient of the sum."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class ExpertsParallel(TensorParallelLayer):
    """The parallel style of `Experts`: the inner features of every expert are split over the ranks."""

    def shard_param(self, module: Experts, param: str, mesh: DeviceMesh) -> None:
        """Replace a parameter by a DTensor; the loader then reads only the part of this rank."""
        value = module._parameters[param]
        if value is None:
            return
        activation = get_activation(module.activation)
        if param == "down_proj":
            placement = Shard(2)
        elif param == "down_proj_bias":
            placement = Replicate()
        elif activation.is_gated and not activation.is_interleaved:  # the same rows of gate and up
            placement = _StridedShard(dim=1, split_factor=2)
        else:
            placement = Shard(1)
        part = distribute_tensor(value, mesh, [placement], src_data_rank=None)
        module._parameters[param] = nn.Parameter(part, requires_grad=value.requires_grad)

    def install_forward(self, module: Experts, mesh: DeviceMesh) -> Experts:
        """Let the experts compute with this rank's part of the weights and add the outputs of all ranks."""
        forward, group = module.forward, mesh.get_group()

        def parallel_forward(x: Tensor, routing: Routing, *args) -> Tensor:
            weights = _SumGradients.apply(routing.topk_weights, group)
            with _local_parameters(module, group):
                out = forward(_SumGradients.apply(x, group), replace(routing, topk_weights=weights), *args)
            return _SumOutputs.apply(out, group)

        module.forward = parallel_forward
        return module


@contextmanager
def _local_parameters(module: Experts, group: dist.ProcessGroup) -> Iterator[None]:
    """Inside, the parameters are this rank's parts as plain tensors; only rank 0 adds the output bias."""
    parameters = dict(module._parameters)
    for name, value in parameters.items():
        if not isinstance(value, DTensor):
            continue
        local = value.to_local()
        if name == "down_proj_bias":
            local = _SumGradients.apply(local, group) * (dist.get_rank(group) == 0)
        module._parameters[name] = local
    try:
        yield
    finally:
        module._parameters.update(parameters)


def whole_of_halves(tensor: Tensor) -> Tensor:
    """The whole tensor of a part with rows of gate and rows of up; another tensor as it is."""
    if not isinstance(tensor, DTensor) or not isinstance(tensor.placements[0], _StridedShard):
        return tensor
    mesh, (placement,) = tensor.device_mesh, tensor.placements
    local = tensor.detach().to_local().contiguous()
    parts = [torch.empty_like(local) for _ in range(mesh.size())]
    dist.all_gather(parts, local, group=mesh.get_group())
    halves = zip(*(part.chunk(2, placement.dim) for part in parts), strict=True)
    return torch.cat([part for half in halves for part in half], placement.dim)


ALL_PARALLEL_STYLES.register(STYLE, ExpertsParallel())


class ParallelMixin:
    """Tensor parallel plan of a model with `Experts`, and what such a model refuses."""

    def init_parallel_plans(self) -> None:
        """As in transformers, with the rules of this module in the place of those for other experts."""
        super().init_parallel_plans()
        self._ep_plan, own = {}, {}
        for name, module in self.named_modules():
            for part, style in RULES.get(type(module), {}).items():
                own[re.sub(r"\.\d+(?=\.|$)", ".*", f"{name}.{part}".rstrip("."))] = style
        experts = tuple(name for name, style in own.items() if style == STYLE)
        # replicated: they may share one weight, of which transformers would split only the embedding
        whole = {name for name, module in self.named_modules() if isinstance(module, nn.Embedding)}
        whole.add("lm_head")
        rest = {
            name: style
            for name, style in self._tp_plan.items()
            if not name.startswith(experts) and name not in whole
        }
        self._tp_plan = rest | own

    def gather_sharded_state_dict_for_save(self, model_to_save: nn.Module, state_dict: dict, *args, **kwargs):
        """As in transformers, for parameters that torch 2.11 cannot gather."""
        state = {name: whole_of_halves(value) for name, value in state_dict.items()}
        return super().gather_sharded_state_dict_for_save(model_to_save, state, *args, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config, *args, **kwargs):
        """As in transformers, which calls it before it loads weights.

        Raises:
            ValueError: this model does not support the kind of parallelism or the number of ranks.
        """
        if distributed_config is not None:
            check_parallel(model, distributed_config)
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)


def check_parallel(model: nn.Module, distributed_config) -> None:
    """Raise ValueError if a model with `Experts` does not support `distributed_config` of transformers."""
    kind = type(model).__name__
    ask = lambda name: getattr(distributed_config, name, None) or 1
    if getattr(distributed_config, "enable_expert_parallel", False) or ask("ep_size") > 1:
        raise ValueError(
            "distributed_config must not ask for expert parallelism (enable_expert_parallel, ep_size) of "
            f"{kind}, whose experts are not those of transformers: use tp_size, or for training "
            "cumo_model.training.parallel.expert_parallel"
        )
    if ask("pp_size") > 1:
        raise ValueError(f"distributed_config must have pp_size 1 for {kind}, got {ask('pp_size')}")
    ranks = ask("tp_size")
    if ranks == 1:
        return
    sizes = {
        f"{part}.{field}": getattr(config, field, None)
        for part in ("config", "text_config", "vision_config")
        for config in [model.config if part == "config" else getattr(model.config, part, None)]
        for field in ("num_attention_heads", "num_key_value_heads")
    }
    text = getattr(model.config, "text_config", model.config)
    if text.model_type != "mixtral" and "vision" not in text.model_type:
        sizes["text_config.intermediate_size"] = getattr(text, "intermediate_size", None)
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            sizes[f"the inner size of {name}"] = module.down_proj.shape[2]
        if isinstance(module, CLIPMLP | DenseMLP):
            sizes[f"the inner size of {name}"] = module.fc1.out_features
        if isinstance(module, MoELayer) and module.compat is not None:
            raise ValueError(
                f"tp_size must be 1 with compat {module.compat!r}, which repeats the rounding of whole sums, "
                f"got {ranks}"
            )
    for what, size in sizes.items():
        if size is not None and size % ranks:
            raise ValueError(f"tp_size must divide {what}, {size}, got {ranks}")
