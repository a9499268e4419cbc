"""What answers: a checkpoint in this process (`Local`) or a running server (`Endpoint`)."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cumo_model.checkpoints.folders import fingerprint
from cumo_model.processing.templates import get_template
from cumo_model.serving.endpoint import Endpoint
from cumo_model.serving.local import Local, load

Engine = Local | Endpoint


def open_engine(
    checkpoint: str | os.PathLike | None = None,
    endpoint: str | None = None,
    template: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    bits: int | None = None,
) -> Engine:
    """Load a checkpoint, or connect to a server.

    Args:
        checkpoint: folder of the checkpoint; give either this or `endpoint`.
        endpoint: address of an OpenAI-compatible interface, such as http://127.0.0.1:8000/v1. The other
            arguments are for a checkpoint only.
        template: name of an instruct template; by default that of the checkpoint's processor.
        device: of the model, such as cuda:1; by default the GPU if there is one.
        dtype: of the weights, "float32", "bfloat16" or "float16"; by default that of the files.
        bits: 4 or 8 to quantise the weights with bitsandbytes.

    Raises:
        ValueError: neither or both are given, or as `load`, `Local` and `Endpoint`.
    """
    if (checkpoint is None) == (endpoint is None):
        got = "neither" if checkpoint is None else "both"
        raise ValueError(f"exactly one of a checkpoint and an endpoint must be given, got {got}")
    if endpoint is not None:
        given = {"template": template, "device": device, "dtype": dtype, "bits": bits}
        if named := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"{named[0]} must be None with an endpoint, whose server has it, got {given[named[0]]!r}"
            )
        return Endpoint(endpoint)
    if template is not None and not get_template(template).instruct:  # before the weights are loaded
        raise ValueError(f"template must be an instruct template, got {template!r}")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, None: None}
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(filter(None, dtypes))}, got {dtype!r}")
    model, processor = load(checkpoint, device, dtypes[dtype], bits)
    return Local(model, processor, template, name=f"checkpoint {str(checkpoint)!r}")


@dataclass(frozen=True)
class Source:
    """What answers in a command.

    Attributes:
        engine: an engine, or a function that loads one, at its first call.
        settings: what the answers depend on.
        name: name of the model.
    """

    engine: Engine | Callable[[], Engine]
    settings: dict[str, Any]
    name: str

    @classmethod
    def of(
        cls,
        checkpoint: str | os.PathLike | None,
        endpoint: str | None = None,
        template: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        bits: int | None = None,
        at_once: int = 16,
    ) -> "Source":
        """The source of these options of a command; as in `open_engine`.

        Args:
            checkpoint: folder of the checkpoint; None: ask an endpoint.
            endpoint: address of a running server.
            template: name of an instruct template.
            device: of the model; by default the GPU of this process, if there is one.
            dtype: name of the dtype of the weights.
            bits: 4 or 8 to quantise the weights.
            at_once: requests to the endpoint at the same time.
        """
        if endpoint is not None:
            engine = Endpoint(endpoint, at_once=at_once)
            return cls(engine, {"model": engine.name}, engine.name)
        settings = {"model": fingerprint(checkpoint), "template": template, "dtype": dtype, "bits": bits}
        load = functools.cache(
            lambda: open_engine(checkpoint, None, template, _own_device(device), dtype, bits)
        )
        return cls(load, settings, Path(os.path.abspath(checkpoint)).name)


def _own_device(given: str | None) -> str | None:
    """The device of this process: each of several has a GPU of its own."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or not torch.cuda.is_available() or given not in (None, "cuda"):
        return given
    torch.cuda.set_device(int(rank))  # also for bitsandbytes, which takes the current one
    return f"cuda:{rank}"
