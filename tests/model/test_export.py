"""torch.export and torch.compile of whole models with symbolic batch size and sequence length."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

from cumo_model import MoELayer
from tests.model.conftest import IMAGE_TOKEN

SIZES = [(2, 20), (3, 33), (1, 14), (5, 13)]  # rows, tokens per row; the first is the example
PARTS = [  # configurations in which other code runs
    pytest.param({"text": "mistral"}, id="mistral"),
    pytest.param({"text": "mixtral"}, id="mixtral"),
    pytest.param({"text": "mistral", "vision_experts": 1, "projector_num_experts": 1}, id="dense"),
    pytest.param(
        {"text": "mixtral", "scales": [1], "vision_feature_select_strategy": "full"}, id="one-scale"
    ),
    pytest.param({"text": "mistral", "patch_merge_type": "spatial_unpad"}, id="newline"),
]


def make_batch(rows, tokens, per_picture, lengths=None):
    """Each row begins with a picture; None gives a batch of text."""
    generator = torch.Generator().manual_seed(100 * rows + tokens)
    ids = torch.randint(3, 50, (rows, tokens), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    batch["attention_mask"][0, :1] = 0
    if per_picture is not None:
        ids[:, 1 : 1 + (per_picture if lengths is None else lengths)] = IMAGE_TOKEN
        batch["pixel_values"] = torch.randn(rows, 3, 12, 12, generator=generator)
        if lengths is not None:
            batch["image_lengths"] = torch.full((rows,), lengths)
    return batch


def picture_tokens(model):
    return model.config.picture_layout.tokens(None)


def shapes_of(batch, rows, tokens):
    """Symbolic sizes for every tensor of the batch: one picture per row."""
    dims = {"input_ids": {0: rows, 1: tokens}, "attention_mask": {0: rows, 1: tokens}, "use_cache": None}
    dims |= {"pixel_values": {0: rows}, "image_lengths": {0: rows}}
    return {name: dims[name] for name in batch}


def check(model, batches, rows, tokens, strict):
    """Export the model for the first batch; the program equals the model on all batches."""
    shapes = shapes_of(batches[0], rows, tokens)
    program = export(model, (), batches[0], dynamic_shapes=shapes, strict=strict).module()
    for batch in batches:
        found, wanted = program(**batch), model(**batch)
        assert torch.equal(found.logits, wanted.logits), batch["input_ids"].shape
        assert found.logits.shape[:2] == batch["input_ids"].shape
    return program


STRICT = pytest.param(True, marks=pytest.mark.slow, id="strict")


@pytest.mark.parametrize("strict", [STRICT, False])
@pytest.mark.parametrize("options", PARTS)
def test_program_with_pictures_equals_the_model(tiny_model, options, strict):
    model = tiny_model(**options).eval()
    batches = [make_batch(*size, picture_tokens(model)) for size in SIZES]
    rows, tokens = Dim("batch", max=64), Dim("tokens", min=12, max=128)  # max: the model's positions
    check(model, batches, rows, tokens, strict)


@pytest.mark.parametrize("strict", [STRICT, False])
@pytest.mark.parametrize("text", ["mistral", "mixtral"])
def test_program_of_text_equals_the_model(tiny_model, text, strict):
    model = tiny_model(text=text).eval()
    check(model, [make_batch(*size, None) for size in SIZES], Dim.DYNAMIC, Dim.DYNAMIC, strict)


@pytest.mark.parametrize("strict", [STRICT, False])
def test_program_with_cut_pictures_equals_the_model(tiny_model, strict):
    model = tiny_model().eval()
    batches = [
        make_batch(*size, picture_tokens(model), lengths=n)
        for size, n in zip(SIZES, (4, 9, 7, 2), strict=True)
    ]
    check(model, batches, Dim.DYNAMIC, Dim.DYNAMIC, strict)


@pytest.mark.slow
def test_a_saved_program_equals_the_model(tiny_model, tmp_path):
    model = tiny_model(text="mixtral").eval()
    batches = [make_batch(*size, picture_tokens(model)) for size in SIZES]
    shapes = shapes_of(batches[0], Dim("batch", max=64), Dim("tokens", min=12, max=128))
    program = export(model, (), batches[0], dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "cumo.pt2")
    loaded = torch.export.load(tmp_path / "cumo.pt2").module()
    assert torch.equal(loaded(**batches[1]).logits, model(**batches[1]).logits)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("compat", [None, "cumo"])
def test_program_of_a_layer_equals_the_layer(strict, compat):
    class PerImage(torch.nn.Module):
        """The layer with statistics per image, as tower and connector call it."""

        def __init__(self):
            super().__init__()
            self.layer = MoELayer(10, 12, 4, 2, "quick_gelu", compat=compat)

        def forward(self, x):
            return self.layer(x, groups=x.shape[0])

    layer, example = PerImage(), torch.randn(2, 7, 10)
    rows, tokens = Dim("batch"), Dim("tokens")
    program = export(layer, (example,), dynamic_shapes={"x": {0: rows, 1: tokens}}, strict=strict).module()
    for size in SIZES:
        x = torch.randn(*size, 10)
        assert torch.equal(program(x), layer(x))


@pytest.mark.parametrize("options", PARTS[:3])
def test_one_graph_for_all_batches(tiny_model, options):
    torch._dynamo.reset()
    model = tiny_model(**options).eval()
    counter = CompileCounterWithBackend("eager")  # the same operators: equal bit for bit
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in (size for size in SIZES if size[0] > 1):  # torch compiles again for a size of 1
            batch = make_batch(*size, picture_tokens(model))
            assert torch.equal(compiled(**batch).logits, model(**batch).logits), size
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_losses_without_padding_in_one_graph_and_in_a_program(tiny_model):
    """Each batch has padding, which the router losses leave out."""
    torch._dynamo.reset()
    model = tiny_model(text="mixtral").eval()
    batches = [make_batch(*size, picture_tokens(model)) for size in SIZES if size[0] > 1]
    options = {"output_router_logits": True, "output_router_stats": True}
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    shapes = shapes_of(batches[0], Dim("batch", max=64), Dim("tokens", min=12, max=128))
    shapes |= dict.fromkeys(options)
    with torch.no_grad():
        program = export(model, (), batches[0] | options, dynamic_shapes=shapes, strict=False).module()
        for batch in batches:
            wanted = model(**batch, **options)
            for found in (compiled(**batch, **options), program(**batch, **options)):
                assert torch.equal(found.aux_loss, wanted.aux_loss)
                for name, value in wanted.router_stats["llm"].items():
                    assert torch.equal(found.router_stats["llm"][name], value), name
    assert counter.frame_count == 1
    torch._dynamo.reset()
