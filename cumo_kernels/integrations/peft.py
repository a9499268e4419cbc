"""LoRA on stacked experts without their weights: what peft's ParamWrapper does for experts that run here.

    lora = LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"], lora_dropout=0.05)
    model = get_peft_model(model, lora)

peft computes W + scaling * B A of all experts of a layer, in full size, in every forward pass, and therefore
refuses dropout. Experts that run on cumo_kernels get the factors: y = W x + scaling * B (A dropout(x)).
Everything else of peft stays as it is: names, shapes and files of adapters, several adapters, merging. Other
modules, and experts with another implementation, are computed as peft does it.

Importing this module installs it as soon as peft is imported; it does not import peft. All contact with what
peft does not document is in this file: `RELIES_ON` lists it. If a release of peft has changed it, a warning
says so, and peft's own computation stays.
"""

import contextlib
import copy
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from importlib import metadata
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cumo_kernels import Adapter, PackedWeight

LORA = "peft.tuners.lora"  # the package with ParamWrapper
RELIES_ON = {  # methods of ParamWrapper that are replaced or called, and their parameters after self
    "__init__": ("base_layer", "adapter_name", "parameter_name", "config"),
    "update_layer": ("adapter_name", "r", "lora_alpha", "config"),
    "_activate_lora": ("active_adapters",),
    "get_base_layer": (),
    "get_delta_weight": ("adapter_name",),
    "merge": ("safe_merge", "adapter_names"),
    "unmerge": (),
}

Takes = Callable[[nn.Module, str], bool]
_takers: list[Takes] = []


class _Given(threading.local):
    """Adapters of the experts that this thread is about to run: (module, name of a parameter, adapters)."""

    def __init__(self):
        # set for each thread: torch.compile does not guard on a class attribute of a threading.local
        self.active: tuple[tuple[nn.Module, str, tuple[Adapter, ...]], ...] = ()


_given = _Given()


def adapters_of(module: nn.Module, parameter_name: str) -> tuple[Adapter, ...]:
    """The active LoRA adapters of one stacked weight; to be called in the forward of its module.

    Args:
        module: an experts module that a function given to `takes_adapters` knows.
        parameter_name: name of its weight: (E, N, K), or (E, K, N) if `module.is_transposed`.

    Returns:
        Adapters with a (E, R, K) and b (E, N, R), in the order in which peft has activated them; empty
        without peft, with disabled or merged adapters, and outside of peft's wrapper.
    """
    for owner, name, adapters in _given.active:
        if owner is module and name == parameter_name:
            return adapters
    return ()


def takes_adapters(takes: Takes) -> Takes:
    """Decorator: register a function that tells whether a module's forward asks for adapters.

    Args:
        takes: (module, name of a parameter) -> whether the module, as it is set now, reads `adapters_of` for
            this parameter and computes with what it gets.
    """
    _takers.append(takes)
    return takes


@contextlib.contextmanager
def by_peft() -> Iterator[None]:
    """Inside, peft computes all adapters by itself, with the weights W + B A: for comparisons, in one thread.

    Layers with dropout must not be trained inside.
    """
    takers = _takers[:]
    _takers.clear()
    try:
        yield
    finally:
        _takers[:] = takers


def _takes(module: nn.Module, name: str) -> bool:
    if is_parametrized(module, name):  # its weight would be computed only to look at it
        return False
    weight = getattr(module, name, None)
    fits = isinstance(weight, Tensor) and weight.ndim == 3
    # not a DTensor, which is a shard of W, while A and B are whole, or what another library packs
    fits = fits and (isinstance(weight, PackedWeight) or not is_traceable_wrapper_subclass(weight))
    # peft adds B A of a single expert without transposing it
    fits = fits and not (getattr(module, "is_transposed", False) and weight.shape[0] == 1)
    return fits and any(takes(module, name) for takes in _takers)


def _base_of(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _dropout_of(wrapper: nn.Module, adapter_name: str) -> float:
    """The probability with which inputs of A are dropped now: 0 outside of training."""
    dropout = wrapper.lora_dropout[adapter_name]
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _factors(wrapper: nn.Module, adapter_name: str) -> Adapter:
    """An adapter as peft stores it: lora_A (E R, K) by experts, lora_B (N, R E) with experts last."""
    a, b = wrapper.lora_A[adapter_name].weight, wrapper.lora_B[adapter_name].weight
    rank, num_experts = wrapper.r[adapter_name], wrapper.num_experts
    a = a.reshape(num_experts, rank, a.shape[1])
    b = b.reshape(b.shape[0], rank, num_experts).permute(2, 0, 1)
    return Adapter(a, b, wrapper.scaling[adapter_name], _dropout_of(wrapper, adapter_name))


def _without_dropout(config):
    config = copy.copy(config)
    config.lora_dropout = 0.0
    return config


def _replacements(original: dict[str, Callable]) -> dict[str, Callable]:
    """name -> new method of ParamWrapper, around the original ones."""

    @wraps(original["__init__"])
    def __init__(self, base_layer, adapter_name, parameter_name, config, *args, **kwargs):
        dropout = config.lora_dropout
        if dropout and _takes(_base_of(base_layer), parameter_name):
            config = _without_dropout(config)
        original["__init__"](self, base_layer, adapter_name, parameter_name, config, *args, **kwargs)
        if dropout:
            self.lora_dropout[adapter_name] = nn.Dropout(dropout)

    @wraps(original["update_layer"])
    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
        dropout = config.lora_dropout
        if dropout and _takes(self.get_base_layer(), self.parameter_name):
            config = _without_dropout(config)
        original["update_layer"](self, adapter_name, r, lora_alpha, config, **kwargs)
        if dropout:
            self.lora_dropout[adapter_name] = nn.Dropout(dropout)

    @wraps(original["_activate_lora"])
    @contextlib.contextmanager
    def _activate_lora(self, active_adapters):
        base, names = self.get_base_layer(), [name for name in active_adapters if name in self.lora_A]
        if not _takes(base, self.parameter_name):
            for name in names:
                if dropout := _dropout_of(self, name):
                    raise ValueError(
                        f"lora_dropout must be 0 to train {type(base).__name__} with an implementation other "
                        f'than "cumo", since peft has no dropout for stacked weights, got {dropout}'
                    )
            with original["_activate_lora"](self, active_adapters):
                yield
            return
        before = _given.active
        if names:
            adapters = tuple(_factors(self, name) for name in names)
            _given.active = (*before, (base, self.parameter_name, adapters))
        try:
            yield
        finally:
            _given.active = before

    @wraps(original["merge"])
    def merge(self, safe_merge=False, adapter_names=None):
        weight = getattr(self.get_base_layer(), self.parameter_name)
        if not isinstance(weight, PackedWeight):
            return original["merge"](self, safe_merge, adapter_names)
        return _merge_packed(self, weight, safe_merge, adapter_names)

    @wraps(original["unmerge"])
    def unmerge(self):
        weight = getattr(self.get_base_layer(), self.parameter_name)
        if not isinstance(weight, PackedWeight) or not self.merged:
            return original["unmerge"](self)
        weight.detach().copy_(self._packed_before)  # of the same kind: bit by bit
        self.merged_adapters.clear()
        del self._packed_before

    methods = (__init__, update_layer, _activate_lora, merge, unmerge)
    return {method.__name__: method for method in methods}


def _merge_packed(wrapper: nn.Module, weight: PackedWeight, safe: bool, names: list[str] | None) -> None:
    """Add adapters to a packed weight, with one rounding for all of them; keep what `unmerge` restores."""
    from peft.tuners.tuners_utils import check_adapters_to_merge

    names = [name for name in check_adapters_to_merge(wrapper, names) or () if name in wrapper.lora_A]
    if not names:
        return
    warnings.warn(
        f"merging LoRA into a weight of {weight.format} rounds the sum to {weight.format}: outputs change. "
        "Merge into the unquantised model to keep them.",
        stacklevel=4,
    )
    with torch.no_grad():
        total = weight.detach().dequantize(torch.float32)
        for name in names:
            total += wrapper.get_delta_weight(name)
        if safe and not total.isfinite().all():
            raise ValueError(f"adapters to merge must give finite weights, got NaN or infinity of {names}")
        if not wrapper.merged:
            wrapper._packed_before = weight.detach().clone()
        weight.detach().copy_(total)
    wrapper.merged_adapters.extend(names)


def _unlike(wrapper_class: type) -> str | None:
    """What of RELIES_ON this release of peft does not have, or None."""
    for name, parameters in RELIES_ON.items():
        method = getattr(wrapper_class, name, None)
        if method is None:
            return f"it has no method {name}"
        found = list(inspect.signature(method).parameters)[1:]
        if missing := [wanted for wanted in parameters if wanted not in found]:
            return f"its method {name} has no parameter {missing[0]}"
    return None


def _miscomputed(layer: ModuleType) -> str | None:
    """Whether the factors that are read here are those whose product peft adds: on two tiny layers."""
    from peft.tuners.lora import LoraConfig

    class Tiny(nn.Module):
        def __init__(self, is_transposed: bool):
            super().__init__()
            self.is_transposed = is_transposed
            self.weight = nn.Parameter(torch.zeros(2, 3, 5))

    config = LoraConfig(r=2, lora_alpha=3, target_parameters=["weight"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        for is_transposed in (False, True):
            tiny = Tiny(is_transposed)
            wrapper = layer.ParamWrapper(tiny, "default", "weight", config, r=2, lora_alpha=3)
            adapter = _factors(wrapper, "default")
            delta = (adapter.b @ adapter.a).mul(adapter.scaling)
            delta = delta.transpose(1, 2) if is_transposed else delta
            wanted = wrapper.get_delta_weight("default")
            # two orders of a sum of two products
            if delta.shape != wanted.shape or not torch.allclose(delta, wanted):
                return "its lora_A and lora_B have another layout"
    return None


def install() -> bool:
    """Let experts that run here compute with the factors of peft's adapters; done when peft is imported.

    Returns:
        Whether it is installed. If not, a warning has said why, and peft's own computation stays.

    Raises:
        ImportError: peft cannot be imported.
    """
    from peft.tuners.lora import layer

    wrapper_class = getattr(layer, "ParamWrapper", None)
    if getattr(wrapper_class, "_runs_on_cumo", False):
        return True
    try:
        reason = "it has no ParamWrapper" if wrapper_class is None else _unlike(wrapper_class)
        reason = reason or _miscomputed(layer)
    except Exception as error:  # any error of another release is the reason
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        warnings.warn(
            f"cumo_kernels does not support peft {metadata.version('peft')}: {reason}. LoRA on stacked "
            "experts is computed by peft itself, which builds the weights of all experts and has no dropout.",
            stacklevel=2,
        )
        return False
    original = {name: wrapper_class.__dict__[name] for name in RELIES_ON if name in wrapper_class.__dict__}
    for name, method in _replacements(original).items():
        setattr(wrapper_class, name, method)
    wrapper_class._runs_on_cumo = True
    return True


class _Watch:
    """A finder that finds what the others do, and installs when peft's LoRA has been imported.

    peft itself may be half imported when this is created: transformers, which it imports, may register cumo.
    """

    def __init__(self):
        self.thread = threading.local()

    def find_spec(self, fullname: str, path=None, target=None):
        searched = self.thread.__dict__.setdefault("searched", set())
        if fullname.partition(".")[0] != "peft" or fullname in searched:
            return None
        searched.add(fullname)
        try:
            others = [other for other in sys.meta_path if other is not self and hasattr(other, "find_spec")]
            specs = (other.find_spec(fullname, path, target) for other in others)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            searched.discard(fullname)
        # a loader that is a class also loads other modules
        if hasattr(spec and spec.loader, "exec_module") and not isinstance(spec.loader, type):
            self._follow(spec.loader)
        return spec

    def _follow(self, loader) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with contextlib.suppress(AttributeError):
                del loader.exec_module  # the loader is its own again
            execute(module)
            if _is_imported(LORA) and self in sys.meta_path:
                sys.meta_path.remove(self)
                install()

        loader.exec_module = exec_module


def _is_imported(name: str) -> bool:
    """Whether a module has been imported, to its end."""
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def watch() -> None:
    """Install now if peft's LoRA is imported, else when it will be."""
    if _is_imported(LORA):
        install()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


watch()
