"""Cases: calls of the public ops as data, shared by tests, the fuzzer and the command line.

A case is written as `expert_mlp T=57 H=49 activation=swiglu dtype=bf16`; a field that is left out has the
default of `Case`. `build` makes the call, its reference in plain PyTorch and the inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from cumo_kernels import ops
from cumo_kernels.activations import get_activation
from cumo_kernels.backends import reference
from cumo_kernels.tiles.problems import DTYPES
from cumo_kernels.types import Routing
from cumo_kernels.verification import packed_cases, scored_cases
from cumo_kernels.verification.accuracy import PATTERNS, make_routing

LAYOUTS = ("contiguous", "transposed", "strided", "shifted")
PLAIN = ("expert_mlp", "route", scored_cases.OP, "grouped_gemm", "permute", "combine", "activate")
OPS = (*PLAIN, *packed_cases.OPS)


@dataclass(frozen=True)
class Case:
    """One call. Letters as in cumo_kernels/types.py; an op ignores fields that it does not use.

    route takes logits, or with `gated` hidden states and a gate. grouped_gemm has weights (E, I, H) and with
    `gated` takes its rows in token order. Pattern "dropped" is "uniform" with a third of the slots dropped.
    The logits of an `exact` gated route are exact in every dtype and order of summation. `ragged` groups have
    any length, and some tokens may be in no group. `weights` and `rank` are those of the ops with packed
    weights and adapters; rank 0 is no adapter. There H and I are rounded up to whole blocks.
    scored_route is route with the scores of `router`.
    """

    op: str
    T: int = 40
    H: int = 32
    I: int = 24
    O: int = 16
    E: int = 4
    K: int = 2
    activation: str = "quick_gelu"
    bias: bool = True
    gated: bool = False
    exact: bool = False
    memory: str = "preact"
    groups: int = 1
    ragged: bool = False
    pattern: str = "uniform"
    layout: str = "contiguous"  # memory layout of the input rows
    weights: str = "nf4"
    rank: int = 0
    router: str = "sigmoid-groups"
    dtype: str = "fp32"
    seed: int = 0

    def __str__(self) -> str:
        words = [self.op]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                words.append(f"{field.name}={int(value) if isinstance(value, bool) else value}")
        return " ".join(words)

    @property
    def problem(self) -> str | None:
        """Why this is not a valid call, or None."""
        for name, known in (
            ("op", OPS),
            ("memory", ops.experts.MEMORY_PLANS),
            ("pattern", (*PATTERNS, "dropped")),
            ("layout", LAYOUTS),
            ("dtype", DTYPES),
            ("weights", packed_cases.WEIGHTS),
            ("router", scored_cases.ROUTERS),
        ):
            if getattr(self, name) not in known:
                return f"{name} must be one of {list(known)}, got {getattr(self, name)!r}"
        try:
            get_activation(self.activation)
        except ValueError as e:
            return str(e)
        for name in ("H", "I", "O", "E", "K", "groups"):
            if getattr(self, name) < 1:
                return f"{name} must be at least 1, got {getattr(self, name)}"
        for name in ("T", "rank"):
            if getattr(self, name) < 0:
                return f"{name} must be at least 0, got {getattr(self, name)}"
        if self.op in packed_cases.OPS:
            if self.weights == "plain" and (self.op == "packed_grouped_gemm" or not self.rank):
                return f"weights must be packed, else this is another op, got {self}"
        if self.K > self.E:
            return f"K must be at most E = {self.E}, got {self.K}"
        if self.T % self.groups:
            return f"groups must divide T = {self.T}, got {self.groups}"
        return None


def parse(text: str) -> Case:
    """Parse the text that `str` makes of a case.

    Raises:
        ValueError: a word, a name or a value is wrong.
    """
    op, *words = text.split() or [""]
    kinds = {field.name: field.type for field in fields(Case)}
    given = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in kinds or name == "op" or not value:
            raise ValueError(f"a case must be 'op name=value ...' with names {list(kinds)[1:]}, got {word!r}")
        try:
            given[name] = {int: int, bool: lambda v: bool(int(v)), str: str}[kinds[name]](value)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {value!r}") from None
    case = Case(op, **given)
    if case.problem is not None:
        raise ValueError(case.problem)
    return case


@dataclass(frozen=True)
class Call:
    """A case, ready to run; `run` and `reference` take `inputs`."""

    run: Callable[..., Tensor | tuple[Tensor, ...]]  # through the public op
    reference: Callable[..., Tensor | tuple[Tensor, ...]]  # plain PyTorch
    inputs: tuple[Tensor, ...]
    integers: Callable[..., tuple[Tensor, ...]] | None = None  # outputs of the public op that must be exact
    true_integers: tuple[Tensor, ...] = ()
    reroute: Callable[[], None] | None = None  # replace the routing, in the same memory


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A differentiable copy of `x` (rows, columns) in another memory layout."""
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "strided":
        return torch.nn.functional.pad(x, (0, 3))[:, : x.shape[1]]
    if layout == "shifted":  # one element past an aligned address
        return torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view(x.shape)
    return x


def _routing(case: Case, device: str) -> Routing:
    if case.pattern != "dropped":
        return make_routing(case.pattern, case.T, case.E, case.K, device, case.seed)
    plan = make_routing("uniform", case.T, case.E, case.K, device, case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    drop = (torch.rand(case.T, case.K, generator=generator) < 1 / 3).to(device)
    indices = torch.where(drop, case.E, plan.topk_indices)
    return ops.routing_from_topk(plan.topk_weights, indices, case.E)


def _plan(routing: Routing) -> tuple[Tensor, ...]:
    return (
        routing.tokens_per_expert,
        routing.expert_offsets,
        routing.permutation,
        routing.inverse_permutation,
    )


def _reroute(case: Case, routing: Routing, device: str) -> None:
    """Overwrite `routing` with a different routing."""
    pattern = "skewed" if case.pattern == "one_expert" else "one_expert"
    other = make_routing(pattern, case.T, case.E, case.K, device, case.seed + 1)
    routing.topk_indices.copy_(other.topk_indices)
    for old, new in zip(_plan(routing), _plan(other), strict=True):
        old.copy_(new)


def build(case: Case, device: str = "cpu") -> Call:
    """The call of `case`, on random inputs that its seed fixes.

    Raises:
        ValueError: `case` has a problem.
    """
    if case.problem is not None:
        raise ValueError(case.problem)
    generator = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]
    draw = lambda *size: torch.randn(*size, generator=generator).to(device, dtype)
    T, H, I, O, E, K = case.T, case.H, case.I, case.O, case.E, case.K
    width = I * (1 + get_activation(case.activation).is_gated)
    place = lambda x: laid_out(x, case.layout)

    if case.op == "activate":
        name = case.activation
        return Call(
            lambda x: ops.activate(place(x), name), lambda x: reference.activate(x, name), (draw(T, width),)
        )
    if case.op in ROUTES:
        return _build_route(case, device, draw, generator)

    routing = _routing(case, device)
    indices, inverse, offsets = routing.topk_indices, routing.inverse_permutation, routing.expert_offsets
    permutation = routing.permutation
    integers = lambda *_: _plan(ops.routing_from_topk(routing.topk_weights, indices, E))
    exact = {
        "integers": integers,
        "true_integers": reference.sort_by_expert(indices, E),
        "reroute": lambda: _reroute(case, routing, device),
    }
    if case.op == "permute":
        return Call(
            lambda x: ops.permute(place(x), routing),
            lambda x: reference.permute(x, permutation, inverse, K),
            (draw(T, H),),
            **exact,
        )
    if case.op == "combine":
        return Call(
            lambda rows, w: ops.combine(place(rows), ops.routing_from_topk(w, indices, E)),
            lambda rows, w: reference.combine(rows, w, inverse, K),
            (draw(T * K, H), routing.topk_weights),
            **exact,
        )
    if case.op in packed_cases.OPS:
        return Call(*packed_cases.PARTS[case.op](case, draw, place, routing), **exact)
    biases = (draw(E, width),) if case.bias else ()
    up = draw(E, width, H) / H**0.5
    if case.op == "grouped_gemm":
        plan = (permutation, inverse) if case.gated else (None, None)
        return Call(
            lambda x, w, b=None: ops.grouped_gemm(
                place(x), w, offsets, bias=b, gather=routing if case.gated else None,
                activation=case.activation,
            ),
            lambda x, w, b=None: reference.grouped_gemm(x, w, offsets, b, *plan, K, case.activation)[0],
            (draw(T if case.gated else T * K, H), up, *biases),
            **exact,
        )  # fmt: skip
    if case.bias:
        biases += (draw(E, O),)
    return Call(
        lambda x, w, up, down, *b: ops.expert_mlp(
            place(x), ops.routing_from_topk(w, indices, E), up, down, *b,
            activation=case.activation, memory=case.memory,
        ),
        lambda x, w, up, down, *b: reference.expert_mlp(
            x, w, permutation, inverse, offsets, up, down, *(b or (None, None)), case.activation, "none"
        )[0],
        (draw(T, H), routing.topk_weights, up, draw(E, O, I) / I**0.5, *biases),
        **exact,
    )  # fmt: skip


EXACT_TERMS = 250  # terms of a logit: bf16 represents every integer up to 256
EXACT_UNIT = 1 / 8  # each of them, small enough that the softmax of a few hundred does not saturate


def _exact_inputs(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (T, H) of -1, 0 and 1 and a gate (E, H) of -1/8 and 1/8, in fp32.

    At most EXACT_TERMS products of a token and an expert are not zero. So all partial sums are multiples of
    EXACT_UNIT that bf16 represents, also after the yardstick's random signs. Every column has its share: of
    any `apart` consecutive tokens one is not zero there.
    """
    apart = -(-case.H // EXACT_TERMS)
    turns = torch.randperm(case.H, generator=generator) + torch.arange(case.T)[:, None]
    sign = lambda *size: torch.randint(2, size, generator=generator) * 2.0 - 1
    return sign(case.T, case.H) * (turns % apart == 0), sign(case.E, case.H) * EXACT_UNIT


def _exact_logits(x: Tensor, gate: Tensor) -> Tensor:
    """x @ gate.T for such inputs, exact also inside UnsplitSums (rounding.py), which perturbs other sums.

    Any error in the logits, however small, would decide ties and so excuse any weight.
    """
    logits = x @ gate.T
    nearest = (logits.detach() / EXACT_UNIT).round() * EXACT_UNIT
    return logits + (nearest - logits.detach())


def _build_route(case: Case, device: str, draw: Callable[..., Tensor], generator: torch.Generator) -> Call:
    """Weights and statistics; a gate's logits must be `exact`, or rounding decides the choice."""
    groups, offsets = case.groups, None
    if case.ragged:
        ends = torch.randint(case.T + 1, (groups + 1,), generator=generator, dtype=torch.int32)
        groups = offsets = ends.sort().values.to(device)
    args = (offsets, case.groups, case.K, True)
    place = lambda x: laid_out(x, case.layout)
    if case.op == scored_cases.OP:
        gated, logits_of = (), (lambda x: x)
        if case.gated:
            gated = tuple(t.to(device, DTYPES[case.dtype]) for t in _exact_inputs(case, generator))
            logits_of = _exact_logits
        return Call(*scored_cases.parts(case, draw(case.T, case.E), gated, logits_of, place, groups, offsets))

    def found(x: Tensor, *gate: Tensor) -> Routing:
        return ops.route(place(x), case.K, *gate, groups=groups)

    def run(x: Tensor, *gate: Tensor) -> tuple[Tensor, ...]:
        routing = found(x, *gate)
        return routing.topk_weights, routing.stats.mean_probs, routing.stats.mean_squared_logsumexp

    if case.gated and not case.exact:
        inputs = (draw(case.T, case.H), draw(case.E, case.H) / case.H**0.5)
        return Call(run, lambda x, w: reference.route(x, w, *args)[::2], inputs)
    if case.gated:
        logits_of = _exact_logits
        inputs = tuple(t.to(device, DTYPES[case.dtype]) for t in _exact_inputs(case, generator))
    else:
        logits_of, inputs = (lambda x: x), (draw(case.T, case.E),)
    indices = reference.route(logits_of(*inputs), None, *args)[1]
    return Call(
        run,
        lambda *inputs: reference.route(logits_of(*inputs), None, *args)[::2],
        inputs,
        integers=lambda *inputs: (found(*inputs).topk_indices, *_plan(found(*inputs))),
        true_integers=(indices, *reference.sort_by_expert(indices, case.E)),
    )


ROUTES = ("route", scored_cases.OP)
MATMULS = ("expert_mlp", "grouped_gemm", *packed_cases.OPS)
LAYERS = ("expert_mlp", "adapted_expert_mlp")
ACTIVATED = (*MATMULS, "activate")
SPELLED = (  # limits in reach of random numbers, and an order of columns
    "swiglu_clamped(limit=0.75)",
    "swiglu_oai(alpha=1.25,limit=0.5)",
    "clamped_swiglu(limit=0.375)",
    "geglu(interleaved)",
)
# every family is used with every op, or with its "ops"; any other value replaces the default of `Case`
FAMILIES: dict[str, dict] = {
    "plain": {},
    "no-token": {"T": 0},
    "one-token": {"T": 1},
    "odd-tails": {"T": 57, "H": 97, "I": 34, "O": 35, "E": 7, "K": 3},
    "top_k-equals-experts": {"T": 24, "K": 4},
    "one-expert": {"T": 33, "E": 1, "K": 1},
    "many-experts": {"T": 64, "E": 64, "K": 8},
    "skewed": {"T": 96, "pattern": "skewed"},
    "empty-experts": {"T": 30, "pattern": "empty"},
    "all-to-one": {"T": 48, "pattern": "one_expert"},
    "dropped-slots": {"T": 41, "pattern": "dropped"},
    "swiglu-no-bias": {"activation": "swiglu", "bias": False, "memory": "x"},
    "gelu-all": {"T": 57, "activation": "gelu", "memory": "all"},
    "ragged-groups": {"ops": ROUTES, "T": 57, "groups": 3, "ragged": True},
    "geglu-gathered": {"T": 57, "activation": "geglu", "gated": True, "groups": 3},
    "transposed": {"layout": "transposed"},
    "strided": {"layout": "strided"},
    "shifted": {"layout": "shifted"},
    "several-tiles": {"T": 300, "H": 128, "I": 160, "O": 96},
    "relu": {"ops": ACTIVATED, "activation": "relu"},
    "silu": {"ops": ACTIVATED, "activation": "silu"},
    "gelu-tanh": {"ops": ACTIVATED, "activation": "gelu_tanh"},
    "geglu-tanh": {"ops": ACTIVATED, "activation": "geglu_tanh"},
    "relu2": {"ops": ACTIVATED, "activation": "relu2"},
    "reglu": {"ops": ACTIVATED, "activation": "reglu"},
    **{f"parameters-{number}": {"ops": ACTIVATED, "activation": name} for number, name in enumerate(SPELLED)},
}
ROUTER = {"ops": ROUTES, "gated": True, "exact": True, "T": 300, "H": 1024}
SORTED = {"T": 2308, "H": 512, "I": 640, "O": 384}  # both backends copy rows into expert order
DECODE = {"ops": LAYERS, "E": 8, "activation": "swiglu", "bias": False}
ALIGNED: dict[str, dict] = {  # small sizes that TMA and wgmma accept
    "aligned": {"T": 300, "H": 512, "I": 640, "O": 384},
    "aligned-swiglu": {
        "T": 300, "H": 512, "I": 640, "O": 512, "E": 8, "activation": "swiglu", "bias": False,
    },
    "aligned-router": ROUTER | {"H": 512},
    "aligned-sorted": SORTED | {"ops": MATMULS},
    "aligned-decode-1": DECODE | {"T": 1, "H": 512, "I": 1024, "O": 512},
    "aligned-decode-16": DECODE | {"T": 16, "H": 512, "I": 1024, "O": 512},
}  # fmt: skip
GPU_FAMILIES: dict[str, dict] = ALIGNED | {
    "clip-crop": {"T": 577, "H": 1024, "I": 4096, "O": 1024},
    "clip-long": {"T": 4616, "H": 1024, "I": 4096, "O": 1024},
    "clip-skewed": {"T": 4616, "H": 1024, "I": 4096, "O": 1024, "pattern": "skewed"},
    "connector": {"T": 576, "H": 2048, "I": 4096, "O": 4096, "activation": "gelu"},
    # with fewer tokens there would be few slot weights, so several draws: 45 GB of fp64 gradients
    "mixtral-32": {
        "T": 32, "H": 4096, "I": 3584, "O": 4096, "E": 8, "activation": "swiglu", "bias": False,
    },
    # with so few tokens the yardstick makes up to eight draws, 9 GB
    "decode-1": DECODE | {"T": 1, "H": 1024, "I": 2048, "O": 1024},
    "decode-16": DECODE | {"T": 16, "H": 1024, "I": 2048, "O": 1024},
    "sorted-dropped": SORTED | {"T": 2400, "pattern": "dropped"},
    "sorted-dropped-swiglu": SORTED | {
        "ops": MATMULS, "T": 2400, "E": 8, "activation": "swiglu", "memory": "x", "pattern": "dropped",
    },
    "256-experts": {"ops": (*ROUTES, "permute", "combine", *MATMULS), "T": 96, "E": 256, "K": 8},
    # not a power of two; and the largest number
    "384-experts": {"ops": (*ROUTES, "permute"), "T": 96, "E": 384, "K": 8},
    "1024-experts": {"ops": (*ROUTES, "permute", "combine", *MATMULS), "T": 64, "E": 1024, "K": 32},
    "memory-x": SORTED | {"ops": LAYERS, "T": 600, "memory": "x"},
    "memory-all": SORTED | {"ops": LAYERS, "T": 600, "memory": "all"},
    "gated-router": ROUTER,
    "gated-router-16": ROUTER | {"T": 16},
    "gated-router-rounded": ROUTER | {"exact": False},  # in fp32: tests that products are not tf32
    "gated-router-groups": ROUTER | {"T": 320, "groups": 5},
    "gated-router-ragged": ROUTER | {"T": 320, "groups": 5, "ragged": True},
    "gated-router-8": ROUTER | {"H": 4096, "E": 8},
    "gated-router-8-16": ROUTER | {"T": 16, "H": 4096, "E": 8},
    "gated-router-64": ROUTER | {"H": 512, "E": 64, "K": 8},
    "gated-router-64-16": ROUTER | {"T": 16, "H": 512, "E": 64, "K": 8},
}  # fmt: skip
# the default for Triton's interpreter (about a second per call): one awkward family, not every path
FEW: dict[str, dict] = {
    "awkward-packed": {
        "ops": packed_cases.OPS, "T": 33, "H": 40, "I": 20, "O": 35, "E": 3, "activation": "swiglu",
        "gated": True, "pattern": "dropped", "layout": "strided", "weights": "int4z", "rank": 5,
    },
    "awkward": {
        "ops": PLAIN,
        "T": 57, "H": 97, "I": 34, "O": 35, "E": 7, "K": 3, "activation": "geglu", "gated": True, "groups": 3,
        "ragged": True, "pattern": "dropped", "layout": "strided",
    },
    "awkward-gelu": {
        "ops": PLAIN,
        "T": 57, "H": 97, "I": 34, "O": 35, "E": 7, "K": 3, "activation": "gelu", "groups": 3,
        "pattern": "dropped", "layout": "strided",
    },
}  # fmt: skip

# for rehearsals: enough tokens that no draw is repeated for few elements
TINY: dict[str, dict] = {"tiny": {"T": 33, "H": 32, "I": 32, "O": 48, "E": 3}}


def all_cases(families: dict[str, dict], dtypes: tuple[str, ...], names: tuple[str, ...] = OPS):
    """Yields (family, case). Families that are the same for an op give one case.

    Ops alternate, so that a limited time covers all of them. Formats and ranks take turns.
    """
    seen = set()
    for family, values in families.items():
        values = dict(values)
        ops_of_family = values.pop("ops", OPS)
        for dtype in dtypes:
            for op in names:
                if op not in ops_of_family:
                    continue
                number = [*DTYPES].index(dtype)
                turn = packed_cases.in_turn(op, family, number) | scored_cases.in_turn(op, family, number)
                case = Case(op, **turn | values, dtype=dtype)
                if dtype != "fp32":  # rounded logits have ties that fp64 logits do not: no reference
                    case = replace(case, exact=True)
                case = used(case)
                if case not in seen:
                    seen.add(case)
                    yield family, case


def survey(
    device: str, few: bool, dtypes: tuple[str, ...], names: tuple[str, ...], tiny: bool = False
) -> list[tuple[str, Case]]:
    """All (family, case) for a device; on a GPU by dtype, bf16 first, then aligned sizes."""
    if tiny:
        return list(all_cases(TINY, dtypes, names))
    if device != "cuda":
        return list(all_cases(FEW if few else FAMILIES, dtypes, names))
    if few:
        return list(all_cases(ALIGNED | FEW, dtypes, names))
    order = ("bf16", "fp32", "fp16")  # each is complete before the next: a limited time proves whole groups
    rank = lambda entry: (order.index(entry[1].dtype), entry[0] not in ALIGNED, entry[1].op not in PLAIN)
    return sorted(all_cases(ALIGNED | FAMILIES | GPU_FAMILIES, dtypes, names), key=rank)


USES = {
    "route": ("T", "H", "E", "K", "gated", "exact", "groups", "ragged", "layout"),
    "permute": ("T", "H", "E", "K", "pattern", "layout"),
    "combine": ("T", "H", "E", "K", "pattern", "layout"),
    "grouped_gemm": ("T", "H", "I", "E", "K", "activation", "bias", "gated", "pattern", "layout"),
    "activate": ("T", "I", "activation", "layout"),
    "expert_mlp": (
        "T", "H", "I", "O", "E", "K", "activation", "bias", "memory", "pattern", "layout",
    ),
}  # fmt: skip
USES |= {
    scored_cases.OP: (*USES["route"], "router"),
    "packed_grouped_gemm": (*USES["grouped_gemm"], "weights"),
    "adapted_expert_mlp": (*USES["expert_mlp"], "weights", "rank"),
}


def used(case: Case) -> Case:
    """`case` with all fields that its op ignores at their defaults, and packed weights without an adapter."""
    keep = (*USES[case.op], "op", "dtype", "seed")
    if case.op in packed_cases.OPS:
        if case.weights == "plain" and (case.op == "packed_grouped_gemm" or not case.rank):
            case = replace(case, weights="nf4")
    if case.op == scored_cases.OP:  # rounding of logits would decide the choice
        case = replace(case, exact=True)
    if case.op in ROUTES and not case.gated:
        keep = tuple(name for name in keep if name not in ("H", "exact"))
    return replace(case, **{f.name: f.default for f in fields(case) if f.name not in keep})
