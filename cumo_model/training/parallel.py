"""Expert parallelism: the experts of a layer are distributed over processes, and tokens are sent to them.

    rank r of P owns experts [r * E/P, (r + 1) * E/P), as DTensors with Shard(0) on the mesh axis `experts`

    slots, sorted by expert --all-to-all--> owners --expert_mlp--> --all-to-all back--> combine

Each process has its own tokens, so the axis is also one of data parallelism: all other parameters are
replicated or sharded over it as usual. The gradients of the experts' weights are divided by P. If the
gradients of the rest of the model are averaged over processes (DDP, FSDP2), every parameter then has the
gradient of the mean loss.

There are two ways to exchange rows. "exact" sends only the rows that exist; the host must know their number,
which costs one host synchronisation per layer. "padded" reserves, for every pair of processes, space for the
largest number of slots on any process. It needs no host synchronisation, but P times the memory. Unused rows
are dropped slots, which no expert computes. The processes agree on the number of slots with a CPU tensor, so
on GPUs the process group needs the backend "cpu:gloo,cuda:nccl".
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from cumo_kernels import Routing, combine, expert_mlp, permute, routing_from_topk
from cumo_model.model.choices import EXCHANGES
from cumo_model.model.moe import Experts


class _AllToAll(torch.autograd.Function):
    """Send rows to their processes; backward sends the gradients back."""

    @staticmethod
    def forward(ctx, rows: Tensor, send: list[int] | None, receive: list[int] | None, group) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = rows.new_empty(rows.shape[0] if receive is None else sum(receive), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _AllToAll.apply(grad, ctx.receive, ctx.send, ctx.group), None, None, None


class _ScaledGradient(torch.autograd.Function):
    """Returns x unchanged; backward multiplies the gradient by a factor."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None


class ParallelExperts(Experts):
    """`Experts` whose parameters are sharded over processes; `expert_parallel` makes it of an `Experts`.

    Its parameters are DTensors with the global shape (E, ...). `load_state_dict` accepts unsharded tensors.
    """

    mesh: DeviceMesh
    exchange: str

    def _local(self, weight: Tensor | None) -> Tensor | None:
        if weight is None:
            return None
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        return _ScaledGradient.apply(local, 1 / self.mesh.size())

    def forward(self, x: Tensor, routing: Routing, compat: str | None = None) -> Tensor:
        """Apply the experts to the tokens of this process: x (T, H) -> (T, O).

        Args:
            x: (T, H), the tokens of this process.
            routing: their routing plan over all E experts.
            compat: must be None.

        Raises:
            ValueError: `compat` is set; the exchange of rows does not support the rounding of each step.
        """
        if compat is not None:
            raise ValueError(f"compat must be None where experts are spread over processes, got {compat!r}")
        # autocast applies to expert_mlp; rows are sent in the dtype of x
        rows = permute(x, routing)  # (S, H), sorted by expert and so by owner
        shares = routing.tokens_per_expert.view(self.mesh.size(), -1)
        group = self.mesh.get_group()
        theirs = torch.empty_like(shares)  # [p, e]: rows of process p for local expert e
        dist.all_to_all_single(theirs, shares.contiguous(), group=group)
        out = (self._exact if self.exchange == "exact" else self._padded)(rows, shares, theirs, group)
        return combine(out, routing)

    def _compute(self, rows: Tensor, expert: Tensor) -> Tensor:
        """Apply local experts `expert` (R,) to rows (R, H); the number of experts marks a dropped row."""
        up, up_bias = self.up
        up, up_bias, down, down_bias = map(self._local, (up, up_bias, self.down_proj, self.down_proj_bias))
        weights = torch.ones(len(rows), 1, dtype=torch.float32, device=rows.device)
        plan = routing_from_topk(
            weights.to(torch.promote_types(rows.dtype, torch.float32)), expert[:, None], up.shape[0]
        )
        return expert_mlp(rows, plan, up, down, up_bias, down_bias, self.activation)

    def _exact(self, rows: Tensor, shares: Tensor, theirs: Tensor, group) -> Tensor:
        sizes = torch.stack([shares.sum(1), theirs.sum(1)]).tolist()  # the host synchronisation
        send, receive = sizes
        dropped = rows.shape[0] - sum(send)
        arrived = _AllToAll.apply(rows[: sum(send)], send, receive, group)
        local = torch.arange(theirs.shape[1], device=rows.device).repeat(theirs.shape[0])
        expert = torch.repeat_interleave(local, theirs.flatten(), output_size=sum(receive))
        back = _AllToAll.apply(self._compute(arrived, expert), receive, send, group)
        return nn.functional.pad(back, (0, 0, 0, dropped)) if dropped else back

    def _padded(self, rows: Tensor, shares: Tensor, theirs: Tensor, group) -> Tensor:
        slots, processes = rows.shape[0], shares.shape[0]
        most = torch.tensor([slots])
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        room = int(most)
        ends = shares.sum(1).cumsum(0)  # (P,): end of each owner's rows
        position = torch.arange(slots, device=rows.device)
        owner = torch.searchsorted(ends, position, right=True).clamp(max=processes - 1)
        place = owner * room + position - (ends - shares.sum(1))[owner]
        buffer = rows.new_zeros(processes * room, rows.shape[1]).index_copy(0, place, rows)
        arrived = _AllToAll.apply(buffer, None, None, group)
        bounds = theirs.cumsum(1).to(torch.int64)  # (P, E/P)
        offered = torch.arange(room, device=rows.device).expand(processes, -1).contiguous()
        expert = torch.searchsorted(bounds, offered, right=True)
        back = _AllToAll.apply(self._compute(arrived, expert.flatten()), None, None, group)
        return back.index_select(0, place)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name, parameter in self.named_parameters(recurse=False):
            whole = state_dict.get(prefix + name)
            if isinstance(parameter, DTensor) and whole is not None and not isinstance(whole, DTensor):
                state_dict[prefix + name] = shard(whole.to(parameter.device), parameter.device_mesh)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def shard(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """Shard a tensor that all processes have: a DTensor with the rows of this process."""
    share = whole.chunk(mesh.size())[mesh.get_local_rank()]
    return DTensor.from_local(share.detach().clone(), mesh, [Shard(0)], run_check=False)


def expert_mesh(expert_parallel: int, device_type: str = "cpu") -> DeviceMesh:
    """Arrange all processes as a mesh ("data", "experts").

    The experts axis has `expert_parallel` processes. It is the innermost axis, whose links are fastest.

    Raises:
        ValueError: `expert_parallel` does not divide the number of processes.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if expert_parallel < 1 or world % expert_parallel:
        raise ValueError(f"expert_parallel must divide the {world} processes, got {expert_parallel}")
    shape = (world // expert_parallel, expert_parallel)
    return init_device_mesh(device_type, shape, mesh_dim_names=("data", "experts"))


def expert_parallel(model: nn.Module, mesh: DeviceMesh, exchange: str = "exact") -> list[str]:
    """Distribute the experts of every MoELayer of a model over processes, in place.

    Args:
        model: the same weights on every process.
        mesh: one-dimensional mesh of the processes that share the experts: `expert_mesh(n)["experts"]`.
        exchange: "exact" or "padded".

    Returns:
        Names of the parameters that are now DTensors. They are marked as ignored by DDP.

    Raises:
        ValueError: the number of experts of a layer is not a multiple of the number of processes.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
    layers = {name: module for name, module in model.named_modules() if type(module) is Experts}
    for name, experts in layers.items():
        if experts.implementation != "cumo":
            raise ValueError(
                f"experts_implementation must be 'cumo' for experts spread over processes, got "
                f"{experts.implementation!r} for {name}"
            )
        if experts.down_proj.shape[0] % mesh.size():
            raise ValueError(
                f"{name} must have a multiple of {mesh.size()} experts, got {experts.down_proj.shape[0]}"
            )
    names = []
    for name, experts in layers.items():
        experts.__class__ = ParallelExperts
        experts.mesh, experts.exchange = mesh, exchange
        for key, parameter in list(experts.named_parameters(recurse=False)):
            local = nn.Parameter(shard(parameter.data, mesh), requires_grad=parameter.requires_grad)
            experts.register_parameter(key, local)
            names.append(f"{name}.{key}")
    model._ddp_params_and_buffers_to_ignore = names
    return names


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard distributed experts with FSDP2 over the "data" axis.

    Call this before `fully_shard` of the modules that contain them; that call then shards the other
    parameters over all processes.
    """
    for module in model.modules():
        if isinstance(module, ParallelExperts):
            fully_shard(module, mesh=mesh["data"])


def whole(tensor: Tensor) -> Tensor:
    """Gather a DTensor from all processes, which must all call this; return other tensors unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
