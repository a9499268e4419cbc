"""What differs between the releases of transformers that we run with, each with when it can go."""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps

from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 5.24 renamed the argument and the output `past_key_values` to `cache`: until we ask for 5.24
CACHE = next(f.name for f in fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values"))
CACHE_NAMES = ("cache", "past_key_values")


def _cache_under(name: str) -> Callable[[Callable], Callable]:
    """-> decorator for methods: the cache may come under either name, and goes on under `name`."""

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def call(self, *args, **kwargs):
            present = [kwargs.pop(known) for known in CACHE_NAMES if known in kwargs]
            given = [cache for cache in present if cache is not None]
            if len(given) == 2:
                raise ValueError("cache and past_key_values are one argument under two names, got both")
            if present:
                kwargs[name] = given[0] if given else None
            return method(self, *args, **kwargs)

        return call

    return decorate


either_cache_name = _cache_under("cache")  # for our own methods, which have an argument `cache`
this_cache_name = _cache_under(CACHE)  # for those of transformers


def cache_of(outputs) -> dict:
    """The cache in an output of transformers, under this release's name, to hand on."""
    return {CACHE: getattr(outputs, CACHE)}


# transformers 5.24 renamed gradient_checkpointing to activation_checkpointing, in methods and
# TrainingArguments, and warns of the older names, which go in 6: until we ask for 5.24
OLDER, NEWER = "gradient_checkpointing", "activation_checkpointing"
CHECKPOINTING = NEWER if hasattr(PreTrainedModel, f"{NEWER}_enable") else OLDER


def enable_checkpointing(model: PreTrainedModel, options: dict, **more) -> None:
    """transformers' own, under this release's name."""
    getattr(PreTrainedModel, f"{CHECKPOINTING}_enable")(model, options, **more)


class EitherCheckpointing:
    """A model's `activation_checkpointing_enable` and `_disable` go by their older names too."""

    if CHECKPOINTING == OLDER:

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs) -> None:
            self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

        def activation_checkpointing_disable(self) -> None:
            self.gradient_checkpointing_disable()


def checkpointing_arguments(given: dict) -> dict:
    """TrainingArguments `given` with those of checkpointing under this release's names.

    Raises:
        ValueError: both names of one, with different values.
    """
    renamed = dict(given)
    for suffix in ("", "_kwargs"):
        values = [renamed.pop(name + suffix) for name in (NEWER, OLDER) if name + suffix in renamed]
        if len(values) == 2 and values[0] != values[1]:
            raise ValueError(
                f"trainer.{NEWER}{suffix} and trainer.{OLDER}{suffix} are one argument under two names, "
                f"got {values[0]!r} and {values[1]!r}"
            )
        if values:
            renamed[CHECKPOINTING + suffix] = values[0]
    return renamed
