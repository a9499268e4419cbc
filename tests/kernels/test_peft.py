"""LoRA of peft on stacked experts that run on cumo_kernels, compared with what peft computes by itself.

peft's own computation builds W + scaling * B A for all experts; experts_implementation="eager" gets it. The
experts are compared in fp64, outside of their model, whose norms and routers compute in fp32.
"""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, MixtralConfig

import cumo_kernels.integrations.transformers as experts_integration
from cumo_kernels import PackedWeight, pack
from cumo_kernels.integrations import peft as integration
from cumo_kernels.packing.formats import FORMATS
from cumo_kernels.tracing import run_inside
from tests.kernels.adapted_experts import (
    EXPERTS,
    SIZES,
    TARGETS,
    UP,
    E,
    H,
    Holder,
    I,
    K,
    T,
    assert_equals_peft,
    batch,
    config_of,
    parametrised,
    results,
    set_implementation,
)
from tests.rounding import assert_same_formula

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", EXPERTS)
def test_outputs_and_gradients_are_those_of_peft(kind, targets):
    model = peft.get_peft_model(Holder(kind), config_of(kind, targets))
    inputs = batch()
    found = assert_equals_peft(model, inputs)
    trained = [name for name in found if "lora_" in name]
    assert len(trained) == 2 * len(TARGETS[targets]) and all(found[name].any() for name in trained)
    with model.disable_adapter():
        base = model(*inputs)
    assert torch.equal(base, model.base_model.model.experts.get_base_layer()(*inputs))
    with pytest.raises(AssertionError, match=r"is off by \d"):
        assert_same_formula(base.detach(), found["out"])


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_several_adapters_are_added_and_switched(kind):
    """Of other ranks and scalings, one with the scaling of rslora."""
    model = peft.get_peft_model(Holder(kind), config_of(kind))
    model.add_adapter("other", config_of(kind, r=5, lora_alpha=2, use_rslora=True))
    inputs, alone = batch(), []
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        alone.append(assert_equals_peft(model, inputs)["out"])
    assert not any(torch.equal(one, alone[-1]) for one in alone[:2])
    model.base_model.set_adapter(["other"])
    assert torch.equal(model(*inputs), alone[1])


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_merging_and_unmerging(kind):
    model, inputs = peft.get_peft_model(Holder(kind), config_of(kind)), batch()
    before, base = model(*inputs), copy.deepcopy(model.base_model.model.experts.get_base_layer())
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert_same_formula(model(*inputs).detach(), before.detach())
        model.unmerge_adapter()
        assert_same_formula(model(*inputs).detach(), before.detach())
    merged = model.merge_and_unload()
    assert type(merged) is Holder
    assert_same_formula(merged(*inputs).detach(), before.detach())
    assert dict(merged.experts.named_parameters()).keys() == dict(base.named_parameters()).keys()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_files_are_those_of_peft(kind, tmp_path):
    """Each reads what the other has written: the same names, shapes and values, and the same outputs."""
    plain, inputs = Holder(kind), batch()
    model = peft.get_peft_model(copy.deepcopy(plain), config_of(kind))
    model.save_pretrained(tmp_path / "ours")
    with integration.by_peft():
        other = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
        other.save_pretrained(tmp_path / "theirs")
        with parametrised() as calls:
            wanted = other(*inputs)
        assert len(calls) == 2
    found, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert found.keys() == theirs.keys() and len(found) == 4
    assert all(torch.equal(value, theirs[name]) for name, value in found.items())
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "theirs")
    again.load_adapter(tmp_path / "theirs", "second")
    for name in ("default", "second"):
        again.set_adapter(name)
        assert_same_formula(again(*inputs).detach(), wanted.detach())
        assert torch.equal(again(*inputs), model(*inputs))


class Dropped(TorchFunctionMode):
    """Records what dropout gets and returns, in order."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.dropout:
            self.calls.append((args[0].detach().clone(), out.detach().clone()))
        return out


def test_dropout_is_that_of_a_linear_layer():
    """B (A dropout(x)) * scaling for each slot by itself, in training only, over two adapters."""
    model = peft.get_peft_model(Holder("mixtral"), config_of("mixtral", lora_dropout=0.5))
    model.add_adapter("other", config_of("mixtral", r=2, lora_dropout=0.25))
    model.base_model.set_adapter(["default", "other"])
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.5, 0.25] * 2
    inputs = batch()
    x, index, weights = inputs
    down, up = model.base_model.model.experts, model.base_model.model.experts.base_layer
    base = up.base_layer
    model.train()
    with Dropped() as dropped:
        out = model(*inputs)
    rows = torch.argsort(index.flatten(), stable=True)  # slots by expert
    assert [given.shape for given, _ in dropped.calls] == [(T * K, H)] * 2 + [(T * K, I)] * 2
    for given, _ in dropped.calls[:2]:
        assert torch.equal(given, x[rows // K])
    shares = [float((kept == 0).double().mean()) for _, kept in dropped.calls]
    for share, p, (given, kept) in zip(shares, (0.5, 0.25) * 2, dropped.calls, strict=True):
        assert abs(share - p) < 3 * (p * (1 - p) / given.numel()) ** 0.5  # three standard errors
        assert_same_formula(kept[kept != 0], (given / (1 - p))[kept != 0])
    slot = int((rows // K == 0).nonzero()[0]), int((rows // K == 0).nonzero()[1])
    assert not torch.equal(dropped.calls[0][1][slot[0]], dropped.calls[0][1][slot[1]])  # two slots of a token

    def added(wrapper, position, e, first):
        total = 0
        for name, (_, kept) in zip(("default", "other"), dropped.calls[first : first + 2], strict=True):
            delta = wrapper.get_delta_weight(name)[e]
            total = total + delta @ kept[position]
        return total

    wanted = torch.zeros(T, H, dtype=torch.float64)
    for position, slot in enumerate(rows.tolist()):
        e = int(index.flatten()[slot])
        gate, linear = (base.gate_up_proj[e] @ x[slot // K] + added(up, position, e, 0)).chunk(2)
        a = nn.functional.silu(gate) * linear
        assert_same_formula(a.detach(), dropped.calls[2][0][position])
        y = base.down_proj[e] @ a + added(down, position, e, 2)
        wanted[slot // K] += (weights.flatten()[slot] * y).detach()
    assert_same_formula(out.detach(), wanted)
    with Dropped() as dropped:
        model.eval()(*inputs)
    assert not dropped.calls
    assert_equals_peft(model, inputs)


def test_dropout_is_refused_where_peft_computes():
    with pytest.raises(ValueError, match="does not work with lora_dropout != 0"):
        peft.get_peft_model(Holder("mixtral", "eager"), config_of("mixtral", lora_dropout=0.5))
    model = peft.get_peft_model(Holder("mixtral"), config_of("mixtral", lora_dropout=0.5))
    with pytest.raises(ValueError, match="does not work with lora_dropout != 0"):
        biases = config_of("gpt_oss", lora_dropout=0.5)
        biases.target_parameters = ["experts.down_proj_bias"]
        peft.get_peft_model(Holder("gpt_oss"), biases)
    set_implementation(model, "eager")
    model.train()
    with pytest.raises(ValueError, match=r"lora_dropout must be 0 to train MixtralExperts .*, got 0\.5"):
        model(*batch())
    model.eval()(*batch())


class Allocated(TorchDispatchMode):
    """The sizes of all tensors that are allocated inside, also by the operators of this project's ops."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cumo":
            return run_inside(self, func, "cpu", args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("active", [["default"], ["default", "other"]], ids=["one", "two"])
def test_no_tensor_of_the_size_of_all_experts_exists(kind, active):
    """Neither W + B A nor B A, forward or backward; peft's own computation has them, which the test sees."""
    model = peft.get_peft_model(Holder(kind), config_of(kind))
    model.add_adapter("other", config_of(kind))
    model.base_model.set_adapter(active)
    base = model.base_model.model.experts.get_base_layer()
    inputs, whole = batch(), base.down_proj.numel()
    found = {}
    for implementation in ("cumo", "eager"):
        set_implementation(model, implementation)
        with Allocated(*base.parameters()) as allocated:
            results(model, inputs)
        found[implementation] = allocated.largest
    assert found["eager"] >= 2 * whole
    assert found["cumo"] < whole


def test_activation_checkpointing_recomputes_with_the_adapters():
    model, inputs = peft.get_peft_model(Holder("mixtral"), config_of("mixtral")), batch()
    wanted = results(model, inputs)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *inputs):
            return checkpoint(self.model, *inputs, use_reentrant=False)

        def named_parameters(self, *args, **kwargs):
            return model.named_parameters(*args, **kwargs)

    found = results(Checkpointed(), inputs)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_adapters_over_weights_in_four_bits(kind, format):
    """Equal to peft on the dequantised weights; a merge rounds once, and can be undone exactly."""
    torch.manual_seed(0)
    dense = Holder(kind)
    model = peft.get_peft_model(copy.deepcopy(dense), config_of(kind))
    base = model.base_model.model.experts.get_base_layer()
    for name in (UP.get(kind, "gate_up_proj"), "down_proj"):
        weight = getattr(base, name).data
        options = {"group": 32} if format != "mxfp4" else {}
        packed = pack(
            weight.transpose(1, 2).contiguous() if base.is_transposed else weight, format, **options
        )
        packed = packed.transpose(1, 2) if base.is_transposed else packed
        setattr(base, name, nn.Parameter(packed, requires_grad=False))
        getattr(dense.experts, name).data = packed.dequantize()
    other = peft.get_peft_model(dense, config_of(kind))
    other.load_state_dict({n: v for n, v in model.state_dict().items() if "lora_" in n}, strict=False)
    inputs = batch()
    assert experts_integration.refusal(base) is None
    found = results(model, inputs)
    set_implementation(other, "eager")
    assert_same_formula(found, results(other, inputs))
    bytes_before = base.down_proj.packed.clone()
    for safe in (False, True):
        with pytest.warns(UserWarning, match=f"merging LoRA into a weight of {format} rounds the sum"):
            model.merge_adapter(safe_merge=safe)
        assert isinstance(base.down_proj, PackedWeight) and not torch.equal(
            base.down_proj.packed, bytes_before
        )
        merged = base.down_proj.dequantize()
        model.unmerge_adapter()
        assert torch.equal(base.down_proj.packed, bytes_before)
        sum_of_both = base.down_proj.dequantize(torch.float32) + _delta(model)
        other_way = base.down_proj.detach().clone().copy_(sum_of_both)
        assert torch.equal(merged, other_way.dequantize(merged.dtype))
    assert torch.equal(model(*inputs), found["out"])


def _delta(model: nn.Module) -> torch.Tensor:
    return model.base_model.model.experts.get_delta_weight("default").detach()


def test_a_merge_that_is_not_finite_is_refused():
    model = peft.get_peft_model(Holder("mixtral"), config_of("mixtral"))
    base = model.base_model.model.experts.get_base_layer()
    base.down_proj = nn.Parameter(pack(base.down_proj.data), requires_grad=False)
    before = base.down_proj.packed.clone()
    with torch.no_grad():
        model.base_model.model.experts.lora_A["default"].weight[0, 0] = torch.inf
    with warnings.catch_warnings(), pytest.raises(ValueError, match="adapters to merge must give finite"):
        warnings.simplefilter("ignore")
        model.base_model.model.experts.merge(safe_merge=True)
    assert torch.equal(base.down_proj.packed, before)


SMALL = MixtralConfig(
    **SIZES, num_local_experts=E, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=32, initializer_range=0.3,
)  # fmt: skip


def test_adapters_through_transformers_itself(tmp_path):
    """model.add_adapter, set_adapter, disable_adapters and load_adapter, gradient checkpointing, generate."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(SMALL), experts_implementation="cumo")
    model.add_adapter(config_of("mixtral"), "first")
    ids = torch.randint(3, 32, (2, 7))
    with parametrised() as calls, torch.no_grad():
        on = model.eval()(ids).logits
        model.disable_adapters()
        off = model(ids).logits
        model.enable_adapters()
        assert torch.equal(model(ids).logits, on) and not torch.equal(on, off)
    assert not calls
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_config(copy.deepcopy(SMALL), experts_implementation="cumo")
    base = {n.replace(".base_layer", ""): v for n, v in model.state_dict().items() if "lora_" not in n}
    again.load_state_dict(base)
    again.load_adapter(str(tmp_path), "again")
    assert torch.equal(again.eval()(ids).logits, on)
    greedy = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(ids, **greedy), model.generate(ids, **greedy))
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if "lora_" in n})
    assert all(torch.equal(value, grads[1][name]) for name, value in grads[0].items())


def test_compiles_without_a_break():
    model, inputs = peft.get_peft_model(Holder("mixtral"), config_of("mixtral")), batch()
    wanted = results(model, inputs)
    compiled = torch.compile(model.base_model.model.experts, backend="aot_eager", fullgraph=True)
    model.base_model.model.forward = compiled
    assert_same_formula(results(model, inputs), wanted)
    torch._dynamo.reset()
