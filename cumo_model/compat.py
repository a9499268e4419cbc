"""What differs between the releases of transformers that we run with, each with when it can go."""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps

from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 5.24 renamed the argument and the output `past_key_values` to `cache`: until we ask for 5.24
CACHE = next(f.name for f in fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values"))
CACHE_NAMES = ("cache", "past_key_values")


def either_cache_name(forward: Callable) -> Callable:
    """Decorator for methods with an argument `cache`, which then goes by its older name too."""

    @wraps(forward)
    def forward_with(self, *args, **kwargs):
        if "past_key_values" in kwargs:
            older = kwargs.pop("past_key_values")
            if kwargs.get("cache") is not None and older is not None:
                raise ValueError("cache and past_key_values are one argument under two names, got both")
            if kwargs.get("cache") is None:
                kwargs["cache"] = older
        return forward(self, *args, **kwargs)

    return forward_with


def cache_of(outputs) -> dict:
    """The cache in an output of transformers, under this release's name, to hand on."""
    return {CACHE: getattr(outputs, CACHE)}
