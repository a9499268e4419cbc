"""What vLLM cannot run, or would compute otherwise than transformers does."""

from cumo_model.model.config import CumoConfig

FUSED = ("silu", "swish")  # hidden_act of a Mixtral whose experts vLLM computes


def check_config(config: CumoConfig) -> None:
    """
    Raises:
        ValueError: vLLM does not run a model with this configuration; the message names the field.
    """
    text = config.text_config
    if config.compat is not None:
        raise ValueError(f"compat must be None, vLLM does not repeat that rounding, got {config.compat!r}")
    if config.router is not None:
        raise ValueError(f"router must be None, vLLM routes by a softmax without a bias, got {config.router}")
    if text.model_type == "mixtral" and text.hidden_act not in FUSED:
        raise ValueError(
            f"text_config.hidden_act must be one of {', '.join(FUSED)} for Mixtral in vLLM, "
            f"got {text.hidden_act!r}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "quantization_config must be None, vLLM does not read CuMo's quantised weights, got one"
        )
