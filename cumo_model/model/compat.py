"""Differences between the supported transformers releases. Each entry states when it can be removed."""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps

from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 5.24 renamed the argument and output `past_key_values` to `cache`. Remove once 5.24 is
# required.
CACHE = next(f.name for f in fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values"))
CACHE_NAMES = ("cache", "past_key_values")


def _cache_under(name: str) -> Callable[[Callable], Callable]:
    """Decorator for methods: accepts the cache under either name and passes it on as `name`."""

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


either_cache_name = _cache_under("cache")  # for this project's methods, whose argument is `cache`
this_cache_name = _cache_under(CACHE)  # for methods of transformers


def given_cache(arguments: dict) -> Cache | None:
    """The cache in a dict of keyword arguments, under either name."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def cache_argument(cache) -> dict:
    """The cache as a keyword argument of a decoder.

    The paged cache of `generate_batch` is no Cache; the attention takes it under a name of its own.
    """
    return {CACHE: cache} if cache is None or isinstance(cache, Cache) else {"cache": cache}


def cache_of(outputs) -> dict:
    """The cache of a transformers output as a keyword argument, under this release's name."""
    return {CACHE: getattr(outputs, CACHE)}


# transformers 5.24 renamed gradient_checkpointing to activation_checkpointing in methods and
# TrainingArguments. It warns about the old names and will remove them in 6. Remove when 5.24 is required.
OLDER, NEWER = "gradient_checkpointing", "activation_checkpointing"
CHECKPOINTING = NEWER if hasattr(PreTrainedModel, f"{NEWER}_enable") else OLDER


def enable_checkpointing(model: PreTrainedModel, options: dict, **more) -> None:
    """Call transformers' method that enables activation checkpointing, under this release's name."""
    getattr(PreTrainedModel, f"{CHECKPOINTING}_enable")(model, options, **more)


class EitherCheckpointing:
    """Gives a model both the old and the new names of the activation checkpointing methods."""

    if CHECKPOINTING == OLDER:

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs) -> None:
            self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

        def activation_checkpointing_disable(self) -> None:
            self.gradient_checkpointing_disable()


def checkpointing_arguments(given: dict) -> dict:
    """Rename the checkpointing arguments in `given`, keywords of TrainingArguments, to this release's names.

    Raises:
        ValueError: both names of one argument are given, with different values.
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
