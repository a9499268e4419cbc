"""python -m benchmarks.lora: memory of LoRA on a layer's experts, by the factors and as peft computes it.

Both run through peft and the same kernels; peft's own way adds B A to the weights of all experts first. The
script compares outputs and gradients of both in fp64 before it prints anything, at a reduced size.
"""

import argparse
import contextlib
import json
import math
import sys
import weakref

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import cumo_kernels.integrations.transformers  # noqa: F401  registers "cumo"
from benchmarks import record
from cumo_kernels import interrupts
from cumo_kernels.files import write_whole
from cumo_kernels.integrations.peft import by_peft
from cumo_kernels.tracing import run_inside

WAYS = ("factors", "peft")
OUT = record.RESULTS / "lora.md"
MIB = 2**20
MEANING = """\
- saved: what forward keeps for backward, without x, the weights and the adapters;
- peak: all tensors that are alive at the same time in forward and backward, without these;
- largest: the elements of the largest tensor that is allocated.

On a CPU they include the tensors inside of the ops. Those that are derived from shapes come from tensors
without data, and leave out what the ops free before they return."""


class Live(TorchDispatchMode):
    """Counts the bytes of tensors made inside, those alive at the same time, and the largest one."""

    def __init__(self, has_data: bool):
        super().__init__()
        self.has_data, self.now, self.peak, self.largest = has_data, 0, 0, 0
        self.seen: set[int] = set()

    def know(self, *tensors: Tensor) -> None:
        """Do not count these."""
        self.seen |= {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cumo" and self.has_data:
            return run_inside(self, func, "cpu", args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size // tensor.element_size())
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


class Layer(nn.Module):
    """The experts of a Mixtral layer as a model."""

    def __init__(self, hidden: int, intermediate: int, experts: int):
        super().__init__()
        config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts)
        config._experts_implementation_internal = "cumo"
        self.experts = MixtralExperts(config)
        with torch.no_grad():
            for weight in self.experts.parameters():
                weight.normal_(std=weight.shape[2] ** -0.5)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.experts(*inputs)


def adapted(layer: nn.Module, rank: int) -> nn.Module:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LoraConfig(r=rank, target_parameters=names, init_lora_weights=False)
    return get_peft_model(layer, lora)


def batch(tokens: int, hidden: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, and two experts with their weights for each token."""
    index = torch.rand(tokens, experts).argsort(1)[:, :2]
    return torch.randn(tokens, hidden).to(dtype), index, torch.rand(tokens, 2).softmax(1)


def step(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Output, and the gradients of x and of the adapters."""
    x = inputs[0].detach().requires_grad_()
    out = model(x, *inputs[1:])
    adapters = [p for p in model.parameters() if p.requires_grad]
    return out, *torch.autograd.grad(out, [x, *adapters], torch.ones_like(out))


def check(hidden: int, intermediate: int, experts: int, rank: int) -> float:
    """The largest relative difference of both ways in fp64.

    Raises:
        SystemExit: it is more than half of fp64's digits.
    """
    model = adapted(Layer(hidden, intermediate, experts).double(), rank)
    inputs = tuple(
        t.double() if t.is_floating_point() else t for t in batch(32, hidden, experts, torch.float64)
    )
    found = step(model, inputs)
    with by_peft():
        wanted = step(model, inputs)
    pairs = [(a.detach(), b.detach()) for a, b in zip(found, wanted, strict=True)]
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    if not worst < math.sqrt(torch.finfo(torch.float64).eps):
        raise SystemExit(f"the two ways differ by {worst:.1e} in fp64: nothing is reported")
    return worst


def measure(model: nn.Module, inputs: tuple[Tensor, ...], way: str) -> dict[str, int]:
    """saved, peak and largest of one step."""
    known = [*inputs, *model.parameters()]
    given = {t.untyped_storage()._cdata for t in known}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in given:
            kept[storage._cdata] = storage.nbytes()
        return t

    live = Live(not isinstance(inputs[0], FakeTensor))
    live.know(*known)
    context = by_peft() if way == "peft" else torch.enable_grad()
    with context, live, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step(model, inputs)
    return {"saved": sum(kept.values()), "peak": live.peak, "largest": live.largest}


def _without_data(model: nn.Module) -> None:
    """Replace parameters on the meta device, where peft cannot compute, by tensors of a CPU without data."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            empty = torch.empty(p.shape, dtype=p.dtype)
            setattr(module, name, nn.Parameter(empty, requires_grad=p.requires_grad))


def rows(sizes: argparse.Namespace, has_data: bool, dtype: torch.dtype) -> list[str]:
    with torch.device("cpu" if has_data else "meta"):
        model = adapted(Layer(sizes.hidden, sizes.intermediate, sizes.experts).to(dtype), sizes.rank)
    with contextlib.nullcontext() if has_data else FakeTensorMode():
        if not has_data:
            _without_data(model)
        inputs = batch(sizes.tokens, sizes.hidden, sizes.experts, dtype)
        found = {way: measure(model, inputs, way) for way in WAYS}
    one = model.base_model.model.experts.get_base_layer()
    whole = one.gate_up_proj.numel()
    mib = lambda n: f"{n / MIB:,.1f}"
    title = f"H {sizes.hidden}, I {sizes.intermediate}, E {sizes.experts}, r {sizes.rank}, T {sizes.tokens}"
    how = "measured on a CPU" if has_data else "derived from shapes"
    lines = [f"## {title}, {str(dtype).removeprefix('torch.')}, {how}", "",
             f"The weights are {mib(sum(w.nbytes for w in (one.gate_up_proj, one.down_proj)))} MiB; "
             f"gate_up_proj has {whole:,} elements.", "",
             "| way | saved for backward, MiB | peak, MiB | largest tensor, elements |",
             "|---|---|---|---|"]  # fmt: skip
    names = {"factors": "factors: W x + B (A x)", "peft": "peft: (W + B A) x"}
    for way, r in found.items():
        lines.append(f"| {names[way]} | {mib(r['saved'])} | {mib(r['peak'])} | {r['largest']:,} |")
    assert found["factors"]["largest"] < whole <= found["peft"]["largest"], found
    return [*lines, ""]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora", description=__doc__.splitlines()[0])
    for name, value in (
        ("hidden", 512),
        ("intermediate", 1792),
        ("experts", 8),
        ("rank", 16),
        ("tokens", 256),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help="(%(default)s)")
    parser.add_argument("--derived", action="store_true", help="also Mixtral's layer, from shapes alone")
    parser.add_argument("--save", action="store_true", help=f"write {OUT.relative_to(record.ROOT)}")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    worst = check(min(args.hidden, 128), min(args.intermediate, 192), args.experts, args.rank)
    facts = record.versions() | {"commit": record.commit(), "device": record.machine("cpu")["device"]}
    lines = [
        "# LoRA on the experts of a layer: memory", "",
        "`python -m benchmarks.lora --derived --save`; " + json.dumps(facts), "",
        f"Outputs and gradients of both ways in fp64 agree to {worst:.0e}.", "", MEANING, "",
    ]  # fmt: skip
    lines += rows(args, True, torch.bfloat16)
    if args.derived:
        for tokens in (1024, 8192):
            layer = argparse.Namespace(
                hidden=4096, intermediate=14336, experts=8, rank=args.rank, tokens=tokens
            )
            lines += rows(layer, False, torch.bfloat16)
    print("\n".join(lines))
    if args.save:
        write_whole(OUT, "\n".join(lines))
        print(f"written to {OUT.relative_to(record.ROOT)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(interrupts.stoppable(main))
