"""Pictures of routing for the page: patches by expert, and the load of each expert."""

import threading
from pathlib import Path

from cumo_model.analysis.experts import expert_load, plot_picture
from cumo_model.model.moe import MoELayer
from cumo_model.processing.pictures import load_image
from cumo_model.serving.local import Local
from cumo_model.serving.messages import Message, text_of, user_message

_drawing = threading.Lock()  # matplotlib draws one picture at a time


def why_none(engine) -> str | None:
    """The reason why there is no routing to show, or None."""
    if not isinstance(engine, Local):
        return "The routing is known for a model in this process only, not for an endpoint."
    if not any(isinstance(module, MoELayer) for module in engine.model.modules()):
        return "This model has no experts, so there is no routing."
    try:
        from cumo_model.analysis import plots  # noqa: F401  it imports matplotlib
    except ValueError as error:
        return f"No routing: {error} (pip install 'cumo[web]')."
    return None


def draw_routing(engine: Local, picture: str, question: Message, patches: Path, load: Path) -> bool:
    """Draw the routing of a picture.

    Args:
        engine: a model with experts.
        picture: file of the picture.
        question: the message that it was shown with, whose text is routed with it.
        patches: the PNG to write of patches by expert.
        load: the PNG to write of the load of each expert in each layer, for this picture and its question.

    Returns:
        Whether there are patches: the experts may all be in the language model.
    """
    from cumo_model.analysis import plots

    inputs = engine.inputs([user_message(text_of(question), [picture])])
    inputs["pixel_values"] = inputs["pixel_values"].to(engine.model.dtype)
    with _drawing:
        with engine.alone():
            found = expert_load(engine.model, [("picture and question", inputs)])
            has_patches = plot_picture(
                engine.model, engine.processor.image_processor, load_image(picture), patches
            )
        plots.plot_expert_load(found, load)
    return has_patches
