"""Co-upcycling (CuMo, arXiv 2405.05949): make a Mixture-of-Experts model of a dense model.

Each expert is a bit-identical copy of the dense MLP; only the gates are new. The weights of a token's
experts sum to 1, so at step 0 the outputs equal those of the dense model up to rounding. Two options make
the experts differ from the start, so that the outputs differ too: noise, and drop-upcycling (arXiv
2502.19261). Drop-upcycling resamples a share of the inner units of each expert from a normal distribution
with the mean and standard deviation of the weights it replaces.
"""

import copy
import math

import torch
from torch import Tensor
from transformers import MixtralConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from cumo_model.model.config import CumoConfig, check_routers
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.model.moe import MoELayer
from cumo_model.model.routers import RouterOptions

SOURCE_OF = {  # parameter of the experts -> parameters of the dense MLP, joined on rows
    "up_proj": ("fc1.weight",),
    "up_proj_bias": ("fc1.bias",),
    "down_proj": ("fc2.weight",),
    "down_proj_bias": ("fc2.bias",),
}
GATED_SOURCE_OF = {"gate_up_proj": ("gate_proj.weight", "up_proj.weight"), "down_proj": ("down_proj.weight",)}


def upcycle(
    dense: CumoForConditionalGeneration,
    vision_experts: int = 4,
    projector_experts: int = 4,
    text_experts: int = 0,
    top_k: int = 2,
    seed: int = 0,
    vision_top_k: int | None = None,
    projector_top_k: int | None = None,
    text_top_k: int | None = None,
    noise: float = 0.0,
    drop: float = 0.0,
    router: dict | None = None,
) -> CumoForConditionalGeneration:
    """Make a new model with experts in the requested places; with 0 or 1 experts a place does not change.

    Args:
        dense: the model to start from; it is not changed.
        vision_experts: experts of each layer of the vision tower.
        projector_experts: experts of the connector.
        text_experts: experts of each layer of the language model; a mistral becomes a mixtral.
        top_k: experts per token in the places that change.
        seed: seed of the gates, which are drawn from U(-1/sqrt(in), 1/sqrt(in)), and of `noise` and `drop`.
        vision_top_k: `top_k` of the vision tower.
        projector_top_k: `top_k` of the connector.
        text_top_k: `top_k` of the language model.
        noise: standard deviation of normal noise added to the weights of each expert, in units of the
            standard deviation of the weight.
        drop: share of inner units that are resampled in each expert, in [0, 1]; biases keep their values.
        router: options of the routers, as in CumoConfig; None: those of `dense`. Existing experts must have
            them already.

    Returns:
        The new model, with dtype, device and training mode of `dense`.

    Raises:
        ValueError: a requested place has experts already (0 keeps them), the language model is not a
            mistral, or a number is out of range.
    """
    config = upcycled_config(
        dense.config, vision_experts, projector_experts, text_experts, top_k, seed,
        vision_top_k, projector_top_k, text_top_k, noise, drop, router,
    )  # fmt: skip
    with no_init_weights(), torch.device(dense.device):
        moe = CumoForConditionalGeneration._from_config(config, dtype=dense.dtype)
    moe.tie_weights()
    _copy_weights(dense, moe, torch.Generator().manual_seed(seed), noise, drop)
    moe.generation_config = copy.deepcopy(dense.generation_config)
    return moe.train(dense.training)


def upcycled_config(
    dense: CumoConfig,
    vision_experts: int = 4,
    projector_experts: int = 4,
    text_experts: int = 0,
    top_k: int = 2,
    seed: int = 0,
    vision_top_k: int | None = None,
    projector_top_k: int | None = None,
    text_top_k: int | None = None,
    noise: float = 0.0,
    drop: float = 0.0,
    router: dict | None = None,
) -> CumoConfig:
    """The config of what `upcycle` makes of a model with the config `dense`, with its arguments and errors.

    It needs no weights, so that what is refused is refused before they are loaded.
    """
    if not 0 <= noise < math.inf or not 0 <= drop <= 1:
        raise ValueError(
            f"noise must be finite and not negative and drop must lie in [0, 1], got {noise} and {drop}"
        )
    config = copy.deepcopy(dense)
    if router is not None:
        config.router = config.vision_config.router = router_of(dense, router)
    chosen = {
        "vision_experts": (vision_experts, top_k if vision_top_k is None else vision_top_k),
        "projector_experts": (projector_experts, top_k if projector_top_k is None else projector_top_k),
        "text_experts": (text_experts, top_k if text_top_k is None else text_top_k),
    }
    for name, (experts, k) in chosen.items():
        if experts < 0:
            raise ValueError(f"{name} must not be negative (0 leaves the place as it is), got {experts}")
        if experts > 1 and not 1 <= k <= experts:
            raise ValueError(f"top_k must be between 1 and the {experts} experts, got {k}")
    if vision_experts > 1:
        _check_dense("vision_experts", vision_experts, config.vision_config.num_experts > 1)
        vision = config.vision_config
        vision.num_experts, vision.num_experts_per_tok = chosen["vision_experts"]
    if projector_experts > 1:
        _check_dense("projector_experts", projector_experts, config.projector_num_experts > 1)
        config.projector_num_experts, config.projector_num_experts_per_tok = chosen["projector_experts"]
    if text_experts > 1:
        _check_dense("text_experts", text_experts, config.text_config.model_type == "mixtral")
        config.text_config = _mixtral_config(config.text_config, *chosen["text_experts"])
    check_routers(config)
    return config


def router_of(dense: CumoConfig, router: dict) -> dict | None:
    """The options of a model's routers in the form of a config.

    Raises:
        ValueError: `router` is wrong, or not that of the experts that `dense` has already.
    """
    asked = RouterOptions.of(router).changed() or None
    text, vision = dense.text_config, dense.vision_config
    there = max(vision.num_experts, dense.projector_num_experts) > 1 or text.model_type == "mixtral"
    if there and asked != dense.router:
        raise ValueError(f"router must be {dense.router}, that of the experts that are there, got {asked}")
    return asked


def _check_dense(name: str, num_experts: int, is_moe: bool) -> None:
    if is_moe:
        raise ValueError(f"{name} must be 0 for a place that has experts already, got {num_experts}")


def _mixtral_config(text: PreTrainedConfig, num_experts: int, top_k: int) -> MixtralConfig:
    if text.model_type != "mistral":
        raise ValueError(
            f"text_experts must be 0 unless the language model is a mistral, got a {text.model_type}"
        )
    values = {
        key: value for key, value in text.to_dict().items() if key not in ("model_type", "architectures")
    }
    config = MixtralConfig(**values, num_local_experts=num_experts, num_experts_per_tok=top_k)
    config._attn_implementation = text._attn_implementation
    return config


@torch.no_grad()
def _copy_weights(
    dense: CumoForConditionalGeneration,
    moe: CumoForConditionalGeneration,
    generator: torch.Generator,
    noise: float,
    drop: float,
) -> None:
    source = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    new = set()
    for name, module in moe.named_modules():
        if isinstance(module, MoELayer) and f"{name}.gate.weight" not in source:
            bound = 1 / math.sqrt(module.hidden_size)
            drawn = torch.empty(module.gate.weight.shape).uniform_(-bound, bound, generator=generator)
            module.gate.weight.copy_(drawn)
            parts = SOURCE_OF if module.experts.up_name == "up_proj" else GATED_SOURCE_OF
            for key, weight in module.experts.named_parameters():
                # broadcast to all experts
                weight.copy_(torch.cat([source[f"{name}.{part}"] for part in parts[key]]))
            if drop:
                _redraw_units(module, drop, generator)
            if noise:
                for weight in (module.experts.up[0], module.experts.down_proj):
                    for expert in weight:
                        expert.add_(_normal(expert.shape, expert.float().std() * noise, generator).to(expert))
            module.reset_balance()
            new.update(f"{name}.{key}" for key, _ in (*module.named_parameters(), *module.named_buffers()))
    for name, tensor in (*moe.named_parameters(), *moe.named_buffers()):
        if name not in new:
            tensor.copy_(source[name])


def _normal(shape: tuple[int, ...], std: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * std.cpu()


def _redraw_units(layer: MoELayer, drop: float, generator: torch.Generator) -> None:
    """Drop-upcycling of one layer: resample floor(drop * I) inner units of each expert, chosen per expert."""
    up, down = layer.experts.up[0], layer.experts.down_proj
    width = down.shape[2]
    for e in range(len(up)):
        units = torch.randperm(width, generator=generator)[: int(drop * width)]
        rows = [up[e, i * width : (i + 1) * width] for i in range(up.shape[1] // width)]  # gate and up
        for matrix in (*rows, down[e].T):
            old = matrix[units].float()
            if old.numel():
                drawn = _normal(old.shape, old.std(), generator).to(old) + old.mean()
                matrix[units] = drawn.to(matrix)


@torch.no_grad()
def step0_difference(
    dense: CumoForConditionalGeneration, moe: CumoForConditionalGeneration, batch: dict[str, Tensor]
) -> float:
    """Largest absolute difference between the logits of two models on one batch.

    Both models run in evaluation mode; their mode is restored afterwards.

    Args:
        dense: the model before upcycling.
        moe: the model after upcycling.
        batch: keyword arguments of `forward`, without labels.

    Returns:
        The largest absolute difference, in fp32.
    """
    logits = []
    for model in (dense, moe):
        was_training = model.training
        model.eval()
        logits.append(model(**batch, use_cache=False).logits.float())
        model.train(was_training)
    return (logits[0] - logits[1]).abs().max().item()


@torch.no_grad()
def scratch_experts(
    dense: CumoForConditionalGeneration, moe: CumoForConditionalGeneration, seed: int
) -> None:
    """Initialise the experts of the new places randomly, as nn.Linear does; gates are not changed."""
    had = {name for name, module in dense.named_modules() if isinstance(module, MoELayer)}
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    for name, module in moe.named_modules():
        if isinstance(module, MoELayer) and name not in had:
            module.experts.reset_parameters()
    torch.random.set_rng_state(state)
