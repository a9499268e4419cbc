"""The language model head: what the decoder's own CausalLM class computes from hidden states to logits.

CuMo takes the decoder of a CausalLM and has its own `lm_head`. Some architectures scale or cap their logits,
or scale the hidden states first. The names of the configuration fields do not determine the formula: granite
divides by logits_scaling, hyperclovax multiplies by it, and minicpm3 divides the hidden states by it. So the
CausalLM class is run once, on the meta device and with known values in the place of decoder and output
embedding, and the formula is the one of FORMULAS that gives the same numbers. No formula gives them: refused.

The same run finds decoders that need more than `inputs_embeds`, which CuMo cannot give.
"""

import contextlib
import copy
import gc
import inspect
import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import meta_device_safe_creation_ops
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast

from cumo_model.model.compat import CACHE

FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "multiply": lambda x, value: x * value,
    "divide": lambda x, value: x / value,
    "softcap": lambda x, value: torch.tanh(x / value) * value,
}

Step = tuple[str, str]  # "hidden" or "logits", and a name in FUNCTIONS

# field of the text configuration -> what an architecture may do with its value, in the order of application
FORMULAS: dict[str, tuple[Step, ...]] = {
    "logit_scale": (("logits", "multiply"),),  # cohere
    # granite, hyperclovax, minicpm3
    "logits_scaling": (("logits", "divide"), ("logits", "multiply"), ("hidden", "divide")),
    "lm_head_multiplier": (("logits", "multiply"),),  # falcon_h1
    "final_logit_softcapping": (("logits", "softcap"),),  # gemma2
    "logits_soft_cap": (("logits", "softcap"),),  # recurrent_gemma
}

SPARSE = re.compile(r"(^|\.)(experts|block_sparse_moe|moe|router)$")
NEEDED = ("inputs_embeds", "attention_mask", CACHE, "use_cache")
VIEWS = (
    "view",
    "reshape",
    "slice",
    "alias",
    "detach",
    "expand",
    "unsqueeze",
    "squeeze",
    "select",
    "transpose",
)


@dataclass(frozen=True)
class Head:
    """The head of a CausalLM.

    Attributes:
        has_bias: whether the output embedding has a bias.
        weight: name of the output embedding in the CausalLM, such as "lm_head" or "embed_out".
        decoder: name of the decoder in the CausalLM, such as "model" or "transformer".
        steps: (field, step, value) in the order of application.
    """

    has_bias: bool
    weight: str
    decoder: str
    steps: tuple[tuple[str, Step, float], ...] = ()

    def logits(self, lm_head: nn.Module, hidden_states: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., H)."""
        return self.after(lm_head(self.before(hidden_states)))

    def before(self, hidden_states: Tensor) -> Tensor:
        """What the output embedding takes: hidden states (..., H), scaled where the architecture does so."""
        return self._apply("hidden", hidden_states)

    def after(self, scores: Tensor) -> Tensor:
        """Logits of what the output embedding gives (..., V)."""
        return self._apply("logits", scores)

    def _apply(self, place: str, x: Tensor) -> Tensor:
        for _, (where, name), value in self.steps:
            if where == place:
                x = FUNCTIONS[name](x, value)
        return x


def input_embedding_name(decoder: PreTrainedModel) -> str:
    """Name of the input embedding within a decoder, such as "embed_tokens" or "wte"."""
    embedding = decoder.get_input_embeddings()
    return next(name for name, module in decoder.named_modules() if module is embedding)


_heads: dict[tuple[type, str], Head | str] = {}
_lock = threading.RLock()


def head_of(text_config: PreTrainedConfig) -> Head:
    """The head of the CausalLM class of a decoder.

    The result is cached by configuration. No weights are allocated and no random numbers are drawn.

    Args:
        text_config: configuration of a mixtral or of a dense decoder of transformers.

    Raises:
        ValueError: CuMo cannot run this decoder, or does not know what its head computes; the message names
            the field or the model_type, and the reason.
    """
    key = (type(text_config), json.dumps(text_config.to_dict(), default=str, sort_keys=True))
    if key not in _heads:
        # its comparisons need values, also if the model itself is built of fake or meta tensors
        with unset_fake_temporarily(), torch.device("cpu"):
            _heads[key] = _refusal_of_config(text_config) or _examine(text_config)
        if getattr(text_config, "num_hidden_layers", 0) > FEW:
            gc.collect()  # the skeleton of a large model, which has reference cycles
    if isinstance(found := _heads[key], str):
        raise ValueError(found)
    return found


def _not_supported(config: PreTrainedConfig, reason: str) -> str:
    return f"text_config must be a dense decoder that CuMo can run, got {config.model_type!r}: {reason}"


def _refusal_of_config(config: PreTrainedConfig) -> str | None:
    """Why the configuration, or the signature of its decoder, excludes it."""
    kind = type(config)
    if kind not in MODEL_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"text_config must be a text model of transformers, got {config.model_type!r}"
    if config.is_encoder_decoder:
        return _not_supported(config, "is_encoder_decoder is True, its decoder needs an encoder")
    if config.get_text_config(decoder=True) is not config or any(
        isinstance(getattr(config, name, None), PreTrainedConfig)
        and re.search("vision|audio|text|encoder", name)
        for name in config.sub_configs
    ):
        parts = ", ".join(config.sub_configs)
        return _not_supported(
            config, f"it has parts of its own ({parts}); give the configuration of its text model"
        )
    parameters = inspect.signature(MODEL_MAPPING[kind].forward).parameters
    missing = [name for name in NEEDED if name not in parameters]
    if missing:
        return _not_supported(config, f"its decoder does not take {', '.join(missing)}")
    if "encoder_hidden_states" in parameters and getattr(config, "is_decoder", True) is False:
        return _not_supported(config, "is_decoder is False, its attention is bidirectional")
    return None


def _examine(config: PreTrainedConfig) -> Head | str:
    """The head, or the reason why there is none."""
    with _lock, _outside_zero_init(), _fp32():
        causal = _skeleton(config)
        name, decoder = _decoder_of(causal, config)
        kind = type(causal).__name__
        if decoder is None:
            wanted = MODEL_MAPPING[type(config)].__name__
            return _not_supported(config, f"{kind} has no {wanted}")
        if config.model_type != "mixtral" and (sparse := _sparse_module(decoder)):
            return (
                f"text_config.model_type must be mixtral or a dense model, got {config.model_type!r}, which "
                f"has experts or routers ({sparse})"
            )
        try:
            DynamicCache(config=config).get_seq_length()
        except ValueError:  # padding and positions of a prompt depend on it
            return _not_supported(config, "no layer has attention, so its cache has no length")
        embedding, output = causal.get_input_embeddings(), causal.get_output_embeddings()
        known = {id(p) for part in (decoder, output) if part is not None for p in part.parameters()}
        if more := [key for key, p in causal.named_parameters() if id(p) not in known]:
            return _not_supported(
                config, f"{kind} has weights besides decoder and output embedding ({more[0]})"
            )
        if type(output) is not nn.Linear:
            return _not_supported(config, f"the output embedding of {kind} is a {type(output).__name__}")
        if output.in_features != config.hidden_size or embedding.embedding_dim != config.hidden_size:
            field = " word_embed_proj_dim" if hasattr(config, "word_embed_proj_dim") else ""
            return (
                f"text_config.hidden_size must be the width of input and output embeddings,{field} "
                f"{embedding.embedding_dim} and {output.in_features}, got {config.hidden_size} for "
                f"{config.model_type!r}"
            )
        if output.out_features != config.vocab_size:
            return _not_supported(
                config, f"it has {output.out_features} outputs and vocab_size {config.vocab_size}"
            )
        weight = next(key for key, module in causal.named_modules() if module is output)
        ties = bool(getattr(config, "tie_word_embeddings", False))
        if ties != (f"{weight}.weight" in causal.all_tied_weights_keys):
            return (
                f"text_config.tie_word_embeddings must be {not ties} for {config.model_type!r}, because its "
                f"{kind} {'does not tie' if ties else 'ties'} the output embedding, got {ties}"
            )
        if reason := _ids_beyond_embedding(decoder):
            return _not_supported(config, reason)
        steps = _steps(causal, decoder, output, config)
    if isinstance(steps, str):
        return _not_supported(config, steps)
    return Head(output.bias is not None, weight, name, steps)


@contextlib.contextmanager
def _outside_zero_init() -> Iterator[None]:
    """Suspend DeepSpeed's zero.Init, which would partition the parameters of the skeleton."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()


@contextlib.contextmanager
def _fp32() -> Iterator[None]:
    """Create tensors in fp32; `from_pretrained` builds models in their own dtype."""
    dtype = torch.get_default_dtype()
    if dtype == torch.float32:  # nothing is set, as other threads may build models at the same time
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


def _skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The CausalLM on the meta device."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # others check for a GPU
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        try:  # without no_init_weights of transformers, which replaces torch.nn.init for all threads
            return kind(config).eval()
        except NotImplementedError:  # it reads values while it is built
            with meta_device_safe_creation_ops():
                return kind(config).eval()


def _decoder_of(causal: PreTrainedModel, config: PreTrainedConfig) -> tuple[str, PreTrainedModel | None]:
    wanted = MODEL_MAPPING[type(config)]
    return next(((name, part) for name, part in causal.named_children() if type(part) is wanted), ("", None))


def _sparse_module(decoder: nn.Module) -> str | None:
    return next((name for name, _ in decoder.named_modules() if SPARSE.search(name)), None)


class _Output(BaseModelOutputWithPast):
    """The output of a decoder, in which whatever else a decoder may return is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Unknown(Exception):
    """The CausalLM does something between decoder and logits that a Head does not describe."""


@torch.no_grad()
def _steps(
    causal: PreTrainedModel, decoder: nn.Module, output: nn.Linear, config: PreTrainedConfig
) -> tuple[tuple[str, Step, float], ...] | str:
    """Run the CausalLM with known hidden states and scores, and find the formula that it applies to them."""
    kind = type(causal).__name__
    input_ids = torch.zeros(1, 2, dtype=torch.int64, device="cpu")
    # small integers, exact in every dtype; scores at which a cap, a scale and a shift differ
    hidden = (torch.arange(2 * output.in_features, device="cpu") % 13 - 6.0).float().view(1, 2, -1)
    scores = (torch.arange(2 * output.out_features, device="cpu") % 101 - 37.0).float().view(1, 2, -1)
    seen = []

    def run_decoder(*args, **kwargs):
        given = dict(
            zip(inspect.signature(type(decoder).forward).parameters, (None, *args), strict=False), **kwargs
        )
        more = [
            name
            for name, value in given.items()
            if isinstance(value, Tensor) and value is not input_ids and name != "self"
        ]
        if given.get("input_ids") is not input_ids or more:
            raise _Unknown(f"{kind} gives its decoder other inputs than input_ids ({', '.join(more)})")
        return _Output(last_hidden_state=hidden)

    def run_output(states):
        seen.append(states)
        return scores

    output.forward = run_output
    for part in decoder.modules():
        if isinstance(part, PreTrainedModel):  # opt calls a decoder inside its decoder
            part.forward = run_decoder
    try:
        with torch.device("cpu"):
            logits = causal(input_ids=input_ids, use_cache=False, return_dict=True)["logits"]
    except _Unknown as reason:
        return str(reason)
    except Exception as error:
        return f"the head of {kind} cannot be examined ({type(error).__name__}: {error})"
    values = {name: getattr(config, name, None) for name in FORMULAS}
    choices = [
        [None, *((name, step, value) for step in FORMULAS[name])]
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    for chosen in itertools.product(*choices):
        steps = tuple(step for step in chosen if step is not None)
        head = Head(False, "", "", steps)
        if (
            len(seen) == 1
            and torch.equal(seen[0], head._apply("hidden", hidden))
            and torch.equal(logits, head._apply("logits", scores))
        ):
            return steps
    return f"what {kind} does between decoder and logits is none of what is known ({', '.join(FORMULAS)})"


class _Operations(TorchDispatchMode):
    """Counts the operations that compute something. Values that code reads on the host are 1 (True)."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype, device="cpu").item()
        name = func._schema.name.removeprefix("aten::").strip("_")
        if name not in VIEWS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


FEW = 4  # layers that are enough to see what a decoder does with its inputs


@torch.no_grad()
def _ids_beyond_embedding(decoder: PreTrainedModel) -> str | None:
    """Whether the decoder does more with token ids than to look up their embeddings.

    Runs it on the meta device with `input_ids` and with `inputs_embeds` and compares the operations. The
    layers after the first FEW are left out to save time, unless the decoder cannot run without them. Returns
    None if it cannot run on the meta device.
    """
    stacks = [
        (module, name, part)
        for module in decoder.modules()
        for name, part in module.named_children()
        if isinstance(part, nn.ModuleList) and len(part) == decoder.config.num_hidden_layers > FEW
    ]
    input_ids = torch.zeros(1, 3, dtype=torch.int64, device="meta")
    mask = torch.ones_like(input_ids)

    def run(**inputs) -> tuple[Counter[str], bool]:
        with _Operations() as operations, torch.device("meta"):
            output = decoder(**inputs, attention_mask=mask, use_cache=False)
        return operations.seen, hasattr(output, CACHE)

    of_ids = None
    for shortened in (True, False) if stacks else (False,):
        for module, name, part in stacks:
            setattr(module, name, part[:FEW] if shortened else part)
        try:
            of_ids, _ = run(input_ids=input_ids)
            break
        except Exception:  # any kind: the decoder is not written for this device, or needs all layers
            continue
    if of_ids is None:
        return None
    try:
        with _Operations() as lookup, torch.device("meta"):
            embeds = decoder.get_input_embeddings()(input_ids)
        of_embeds, has_cache = run(inputs_embeds=embeds)
    except Exception as error:  # with input_ids it ran
        return (
            f"its decoder does not run with inputs_embeds alone ({type(error).__name__}: {str(error)[:80]})"
        )
    if not has_cache:
        return f"its decoder returns no {CACHE}"
    different = lambda: (of_ids - of_embeds - lookup.seen) + (of_embeds - of_ids)
    # a run may change a state, such as the largest length that dynamic rope has seen
    if different():
        of_embeds, _ = run(inputs_embeds=embeds)
    if different():
        of_ids, _ = run(input_ids=input_ids)
    if more := different():
        named = ", ".join(sorted(more))
        return f"its decoder computes something else with input_ids than with their inputs_embeds ({named})"
    return None
