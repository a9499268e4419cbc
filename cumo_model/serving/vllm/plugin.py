"""The plugin that vLLM loads in each of its processes (entry point group `vllm.general_plugins`)."""

ARCHITECTURE = "CumoForConditionalGeneration"
CLASS = "cumo_model.serving.vllm.model:CumoForVllm"


def register() -> None:
    """Tell vLLM which class runs a CuMo; nothing happens if it knows already.

    The class is named and not imported, because vLLM asks for it only where a CuMo is served.
    """
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, CLASS)
