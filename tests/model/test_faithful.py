"""The whole model compared with the formulas of the original code: all outputs and gradients."""

import pytest
import torch
from torch.func import functional_call

from cumo_kernels.verification.rounding import UnsplitSums
from cumo_model import CumoForConditionalGeneration, MoELayer
from cumo_model.checkpoints.layout import original_names
from tests.model import original
from tests.rounding import assert_same_formula

MODELS = [  # kind, clip_smoe, mlp_smoe, length at which rows are cut, compat
    pytest.param("mistral", True, True, 14, None, id="7b-truncated"),
    pytest.param("mixtral", True, True, None, "cumo", id="8x7b"),
    pytest.param("mixtral", True, True, None, None, id="8x7b-padding-left-out"),
    pytest.param("mistral", False, False, None, None, id="stage-2"),
    pytest.param("mixtral", False, True, 14, "cumo", id="8x7b-dense-tower-truncated"),
]


def batch(max_length=None):
    """The same rows as input of the original code and of CumoModel: image and text, text only, two images.

    For row 1, text only, the original code uses a dummy image. `max_length` truncates rows after the images
    are inserted.
    """
    generator = torch.Generator().manual_seed(2)

    def text(n):
        return torch.randint(3, original.VOCAB, (n,), generator=generator)

    mark = torch.tensor([original.IMAGE])
    rows = [
        torch.cat([text(3), mark, text(8)]),
        text(9),
        torch.cat([text(2), mark, text(3), mark, text(5)]),
    ]
    labels = [row.clone() for row in rows]
    for row in labels:
        row[: len(row) - 4] = -100
        row[row == original.IMAGE] = -100
    pixels = torch.randn(4, 3, original.SIZE, original.SIZE, generator=generator)
    pixels[1] = 0  # the dummy image
    patches = original.GRID**2
    ids, targets, lengths = [], [], []
    for row, wanted in zip(rows, labels, strict=True):
        pieces = [
            (torch.full((patches,), original.VOCAB), torch.full((patches,), -100))
            if t < 0
            else (t[None], y[None])
            for t, y in zip(row, wanted, strict=True)
        ]
        long, target = (torch.cat(p)[:max_length] for p in zip(*pieces, strict=True))
        ids.append(long)
        targets.append(target)
        left = int((long == original.VOCAB).sum())
        for _ in range(max(1, int((row == original.IMAGE).sum()))):
            lengths.append(min(patches, left))
            left -= lengths[-1]
    size = max(map(len, ids))
    pad = torch.nn.functional.pad
    ours = {
        "input_ids": torch.stack([pad(i, (0, size - len(i))) for i in ids]),
        "labels": torch.stack([pad(t, (0, size - len(t)), value=-100) for t in targets]),
        "attention_mask": torch.stack([pad(torch.ones_like(i), (0, size - len(i))) for i in ids]),
        "image_lengths": torch.tensor(lengths),
    }
    return rows, labels, pixels, ours


def run(function, inputs):
    """Outputs and input gradients; the upstream gradient is 1 for the loss and random for the logits."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss, logits = function(*leaves)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9)).to(logits)
    grads = torch.autograd.grad([loss, logits], leaves, [torch.ones_like(loss), upstream], allow_unused=True)
    return [loss.detach(), logits.detach(), *grads]


def relative_errors(found, exact, names):
    """Relative root mean square error of each tensor; None or zero tensors must be the same in both."""
    errors = {}
    for name, a, b in zip(names, found, exact, strict=True):
        assert (a is None or not a.any()) == (b is None or not b.any()), name
        # the bias of a key shifts all scores of a query equally: its gradient is only rounding error
        if b is not None and b.any() and not name.endswith("k_proj.bias"):
            errors[name] = (a.double() - b).norm() / b.norm()
    return errors


@pytest.mark.parametrize("kind, clip_smoe, mlp_smoe, max_length, compat", MODELS)
def test_outputs_losses_and_every_gradient_are_the_formulas(
    tmp_path, kind, clip_smoe, mlp_smoe, max_length, compat
):
    """Padding counts in Mixtral's router losses with compat only."""
    options = {"kind": kind, "clip_smoe": clip_smoe, "mlp_smoe": mlp_smoe}
    tensors = original.write(tmp_path / "theirs", **options)
    model = CumoForConditionalGeneration.from_pretrained(tmp_path / "theirs", compat=compat).train()
    rows, labels, pixels, ours = batch(max_length)
    assert (ours["image_lengths"] < 9).any()
    names, parameters = list(tensors), dict(model.named_parameters())
    parts = {key: original_names(key, tuple(p.shape)) for key, p in parameters.items()}
    assert sorted(name for names in parts.values() for name in names) == sorted(names)
    real = ours["attention_mask"].bool()
    seen = []

    def op(pixel_values, *values):
        theirs = dict(zip(names, values, strict=True))
        joined = {
            key: torch.cat([theirs[name].flatten() for name in parts[key]]).view(p.shape)
            for key, p in parameters.items()
        }
        output = functional_call(model, joined, kwargs={**ours, "pixel_values": pixel_values})
        seen.append(set(output.loss_parts))
        return output.loss, output.logits[real]

    def reference(pixel_values, *values):
        theirs = dict(zip(names, values, strict=True))
        loss, found, logits, mask = original.run(
            theirs,
            rows,
            labels,
            pixel_values,
            **options,
            max_length=max_length or 4096,
            padding_counts=compat is not None,
        )
        assert torch.equal(mask.bool(), real)
        seen.append(set(found))
        return loss, logits[real]

    wide = [t.double() for t in (pixels, *tensors.values())]
    ours_32, theirs_32, exact = (
        run(function, inputs)
        for function, inputs in (
            (op, [pixels, *tensors.values()]),
            (reference, [pixels, *tensors.values()]),
            (reference, wide),
        )
    )
    with UnsplitSums(torch.finfo(torch.float32).eps, torch.Generator().manual_seed(3)):
        with torch.autograd.set_multithreading_enabled(False):
            chains = run(reference, wide)
    labels_of = ["loss", "logits", "pixels", *names]
    errors, theirs, unsplit = (relative_errors(e, exact, labels_of) for e in (ours_32, theirs_32, chains))
    # the rule of cumo_kernels/testing.py, which does not depend on the BLAS of this machine
    allowed = {name: max(theirs[name], unsplit[name]) for name in theirs}
    # rounding errors have similar size in all tensors, so their sum is a more precise measure
    total, limit = (torch.stack([*e.values()]).square().mean().sqrt() for e in (errors, allowed))
    worst = max(errors, key=errors.get)
    assert total <= 2 * limit, f"off by {total:.1e}, the formulas in fp32 by {limit:.1e}; most in {worst}"
    assert max(errors.values()) <= 2 * max(allowed.values()), worst
    assert all(parts == seen[0] for parts in seen)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("compat", ["cumo", None])
def test_the_parts_of_the_loss_are_the_formulas(tmp_path, compat):
    tensors = original.write(tmp_path / "theirs", kind="mixtral")
    options = {"dtype": torch.float64, "compat": compat}
    model = CumoForConditionalGeneration.from_pretrained(tmp_path / "theirs", **options).train()
    rows, labels, pixels, ours = batch()
    padding = {"padding_counts": compat is not None}
    wanted = original.run(tensors, rows, labels, pixels, kind="mixtral", **padding)[1]
    got = model(**ours, pixel_values=pixels).loss_parts
    assert_same_formula(got, wanted)


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("place", ["clip", "mlp", "llm"])
def test_compat_repeats_the_originals_rounding_bit_for_bit(place, top_k):
    """bf16: bitwise equal to formulas rounded step by step; without compat different, and closer to fp64.

    With three experts per token the sum depends on their order.
    """
    F = torch.nn.functional
    activation = {"clip": "quick_gelu", "mlp": "gelu", "llm": "swiglu"}[place]
    bias, width, E = place != "llm", 24 if place == "mlp" else 32, 5 if place == "llm" else 4
    compat = "cumo_llm" if place == "llm" else "cumo"
    options = {"output_size": width, "bias": bias, "compat": compat}
    layer = MoELayer(32, 48, E, top_k, activation, **options).bfloat16()
    x = torch.randn(6, 37, 32).bfloat16()
    experts = layer.experts

    def expert(rows, e, dtype):
        up, up_bias = experts.up
        values = (up[e], up_bias[e] if bias else None)
        z = F.linear(rows, *(None if v is None else v.to(dtype) for v in values))
        if place == "clip":
            a = z * torch.sigmoid(1.702 * z)
        elif place == "mlp":
            a = F.gelu(z)
        else:
            gate, linear = z.chunk(2, -1)
            a = F.silu(gate) * linear
        values = (experts.down_proj[e], experts.down_proj_bias[e] if bias else None)
        return F.linear(a, *(None if v is None else v.to(dtype) for v in values))

    def formulas(x):
        rows = x.flatten(0, 1)[None] if place == "llm" else x
        logits = F.linear(rows, layer.gate.weight.to(x.dtype))
        functions = [lambda rows, e=e: expert(rows, e, x.dtype) for e in range(E)]
        out, _, _ = original.moe(rows, logits, functions, width, per_crop=place != "llm", top_k=top_k)
        return out.reshape(-1, width)

    with torch.no_grad():
        wanted = formulas(x)
        ranked = torch.softmax(layer.gate(x).flatten(0, 1).float(), -1).bfloat16().sort(-1, descending=True)
        if top_k == 2:  # rounded probabilities tie
            assert (ranked.values[:, 1] == ranked.values[:, 2]).any()
        assert torch.equal(layer(x, groups=6).view(-1, width), wanted)
        layer.compat = None
        plain = layer(x, groups=6).view(-1, width)
        exact = formulas(x.double())
    assert not torch.equal(plain, wanted)
    assert (plain - exact).square().mean() < (wanted - exact).square().mean()
