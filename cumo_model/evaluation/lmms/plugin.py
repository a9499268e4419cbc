"""The entry point of lmms-eval: it tells `python -m lmms_eval --model cumo` where the model classes are.

lmms-eval loads it in each of its commands, so the classes are imported only if they are asked for.
"""

CLASSES = "cumo_model.evaluation.lmms.model"


def manifest():
    """Names of the model classes: for tasks with messages, and with `--force_simple` for all others."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "cumo", chat_class_path=f"{CLASSES}.CumoMessages", simple_class_path=f"{CLASSES}.CumoSimple"
    )
