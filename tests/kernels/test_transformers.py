"""cumo's experts in models of transformers, through its experts interface."""

import copy
import importlib
import inspect
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import cumo_kernels.integrations.transformers as integration
from cumo_kernels.testing import assert_as_accurate_as_torch
from tests.rounding import assert_same_formula, assert_same_sums, in_fp64, rounding_of

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FUSED, OWN_GATE = "expert_mlp (swiglu)", "grouped_gemm, its own activation, grouped_gemm"
GPT_OSS = "swiglu_oai(alpha=1.702,limit=7.0,interleaved)"
MODELS = {
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=4), FUSED),
    "qwen3_moe": (
        Qwen3MoeConfig(**SIZES, moe_intermediate_size=20, num_experts=5, num_experts_per_tok=3, head_dim=8),
        FUSED,
    ),
    "qwen2_moe": (
        Qwen2MoeConfig(
            **SIZES,
            moe_intermediate_size=20,
            shared_expert_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        FUSED,
    ),
    "olmoe": (OlmoeConfig(**SIZES, num_experts=6, num_experts_per_tok=2), FUSED),
    "phimoe": (PhimoeConfig(**SIZES, num_local_experts=4), FUSED),
    "granitemoe": (GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2), FUSED),
    "deepseek_v3": (
        DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 4},
            moe_intermediate_size=20,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        FUSED,
    ),
    "gpt_oss": (
        GptOssConfig(
            **SIZES,
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=8,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        f"expert_mlp ({GPT_OSS})",
    ),
}


@pytest.fixture
def make():
    """Factory: name -> model with clearly separated router logits, on the "cumo" experts."""

    def make(name):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(MODELS[name][0]), experts_implementation="cumo"
        )
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" not in key:
                    parameter.normal_(std=0.3)
        return model.eval()

    return make


def experts_of(model):
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "is_transposed")]


def run(model, ids):
    """Logits, and the gradient of every parameter under a fixed upstream gradient."""
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    logits.backward(upstream)
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_same_outputs_and_gradients_as_with_its_own_experts(make, name):
    model, ids = make(name), torch.randint(3, 64, (2, 9))
    assert model.get_experts_implementation()[""] == "cumo"
    line = integration.explain(model).splitlines()[-1]
    assert line.endswith(MODELS[name][1]), line
    names = [key for key, _ in model.named_parameters()]
    theirs = copy.deepcopy(model)
    theirs.set_experts_implementation("eager")
    assert theirs.get_experts_implementation()[""] == "eager"

    def through(model):
        return lambda *values: (
            functional_call(
                model, dict(zip(names, values, strict=True)), kwargs={"input_ids": ids, "use_cache": False}
            ).logits
        )

    assert_as_accurate_as_torch(through(model), through(theirs), *(p.detach() for p in model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_as_accurate_as_their_own_loop(make, name, dtype):
    _, experts = experts_of(make(name))[0]
    names = [key for key, _ in experts.named_parameters()]
    index = torch.stack([torch.randperm(4)[:2] for _ in range(37)])
    index[index == 3] = 2  # expert 3 gets no token, some tokens choose the same expert twice

    def through(implementation):
        module = copy.deepcopy(experts)
        module.config._experts_implementation_internal = implementation

        def function(x, weights, *values):
            return functional_call(module, dict(zip(names, values, strict=True)), (x, index, weights))

        return function

    tensors = [torch.randn(37, 32), torch.rand(37, 2), *(p.detach() for p in experts.parameters())]
    assert_as_accurate_as_torch(through("cumo"), through("eager"), *(t.to(dtype) for t in tensors))


def test_plain_experts_of_nemotron_square_their_relu():
    config = NemotronHConfig(
        hidden_size=16, n_routed_experts=4, moe_intermediate_size=12, moe_latent_size=None, mlp_bias=False
    )
    experts = NemotronHExperts(config).double()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    x, index, weights = torch.randn(9, 16).double(), torch.randint(4, (9, 2)), torch.rand(9, 2).double()
    outs = []
    for implementation in ("cumo", "eager"):
        config._experts_implementation_internal = implementation
        outs.append(experts(x, index, weights))
    assert integration.fused_activation(experts) == "relu2" and integration.refusal(experts) is None
    assert_same_formula(*outs)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_from_pretrained_generates_and_saves_unchanged(make, tmp_path, name):
    model = make(name)
    ids = torch.randint(3, 64, (2, 5))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    model.set_experts_implementation("eager")
    wanted = model.generate(ids, **options)
    model.save_pretrained(tmp_path / "theirs")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", experts_implementation="cumo").eval()
    assert ours.get_experts_implementation()[""] == "cumo"
    assert torch.equal(ours.generate(ids, **options), wanted)
    assert torch.equal(
        ours.generate(ids, cache_implementation="static", disable_compile=True, **options), wanted
    )
    ours.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(again[key], value), key


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_compiles_without_a_break(make, name):
    model, ids = make(name).train(), torch.randint(3, 64, (2, 6))
    eager = run(model, ids)
    rounding = rounding_of(lambda: run(model, ids))
    logits, grads = run(torch.compile(model, backend="aot_eager", fullgraph=True), ids)
    grads = {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}
    assert_same_sums((logits, grads), eager, rounding)
    torch._dynamo.reset()


def mixtral_experts(implementation="cumo", kind=MixtralExperts):
    config = MixtralConfig(**SIZES, num_local_experts=4)
    config._experts_implementation_internal = implementation
    experts = kind(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    return experts


def test_dropped_slots_of_expert_parallelism_contribute_nothing():
    experts, x = mixtral_experts().double(), torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    index, weights = torch.randint(4, (6, 2)), torch.rand(6, 2).double()
    index[1] = 4  # the sentinel: another rank's expert
    index[2, 1] = 4
    out = experts(x, index, weights)
    masked = weights.masked_fill(index == 4, 0)
    assert_same_formula(out, experts(x, index.clamp(max=3), masked))
    assert not out[1].any()
    out.sum().backward()
    assert x.grad[1].abs().max() == 0 and x.grad.isfinite().all()
    assert experts(x[:0], index[:0], weights[:0]).shape == (0, 32)


def test_autocast_runs_in_its_dtype_and_returns_the_callers():
    experts, x = mixtral_experts(), torch.randn(6, 32)
    index, weights = torch.randint(4, (6, 2)), torch.rand(6, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(x, index, weights)
    assert out.dtype == torch.float32
    half = copy.deepcopy(experts).bfloat16()(x.bfloat16(), index, weights)
    assert torch.equal(out, half.float())
    # fp32 hidden states before half-precision weights, like those of an fp32 norm
    assert torch.equal(copy.deepcopy(experts).bfloat16()(x, index, weights), half.float())


def test_unsupported_experts_fall_back_with_a_reason(monkeypatch):
    experts = mixtral_experts()
    x, index, weights = torch.randn(6, 32), torch.randint(4, (6, 2)), torch.rand(6, 2)
    wanted = experts(x, index, weights)
    rounding = rounding_of(lambda: experts(x, index, weights))  # grouped_mm has no fp64
    asked, warned = [], []
    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda *args: asked.append(1) or grouped(*args)
    )
    monkeypatch.setattr(integration.logger, "warning_once", warned.append)
    with monkeypatch.context() as without:
        without.setattr(integration, "FLOATS", (torch.bfloat16,))
        assert_same_sums(experts(x, index, weights), wanted, rounding)
        assert asked == [1] and "its gate_up_proj is torch.float32" in warned[0]
        assert "grouped_mm: its gate_up_proj is torch.float32" in integration.explain(experts)
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    assert "its down_proj is torch.float8_e4m3fn" in integration.refusal(experts)
    del experts.down_proj
    assert "no tensor down_proj" in integration.refusal(experts)


def every_experts_class():
    """(module, class) of all classes that transformers decorates for the experts interface."""
    folder = Path(transformers.__file__).parent / "models"
    for file in sorted(folder.glob("*/modeling_*.py")):
        for name in re.findall(
            r"^@use_experts_implementation(?:\([^)]*\))?\nclass (\w+)", file.read_text(), flags=re.MULTILINE
        ):
            yield f"transformers.models.{file.parent.name}.{file.stem}", name


def small_experts(module, name):
    """A small experts module, from the first config of its file that has the needed fields."""
    sizes = {"hidden_size": 32, "n_embd": 32, "moe_latent_size": None}
    sizes |= dict.fromkeys(("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size"), 24)
    sizes |= dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4)
    configs = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, PreTrainedConfig)]
    if "vl" in module.__name__ or "omni" in module.__name__:  # the file does not import its text's config
        folder = importlib.import_module(module.__name__.replace("modeling", "configuration"))
        configs += [
            c for c in vars(folder).values() if isinstance(c, type) and issubclass(c, PreTrainedConfig)
        ]
    for kind in configs:
        try:
            config = kind()
            for key, value in sizes.items():
                if hasattr(config, key) and not isinstance(getattr(config, key), list):
                    setattr(config, key, value)
            more = [24] if name == "Ernie4_5_VLMoeMoeExperts" else []  # its intermediate_size
            return getattr(module, name)(config, *more)
        except Exception:  # the config of a tower or of an outer model
            continue
    raise AssertionError(f"no config of {module.__name__} makes a {name}")


UNFUSED = {  # classes of transformers after 5.17
    "Inkling2Experts": "its own activation",  # both halves capped by tanh
    "Inkling2LoopExperts": "its own activation",
    "MuseSparkExperts": "swiglu",  # a norm before the sum
}


@pytest.mark.slow
def test_the_experts_of_every_model_that_has_the_interface():
    fused = {}
    for path, name in every_experts_class():
        experts = small_experts(importlib.import_module(path), name).double()
        if hasattr(experts, "post_expert_norm"):  # their own norm computes in fp32 for every dtype
            experts.post_expert_norm = torch.nn.LayerNorm(experts.hidden_dim).double()
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.normal_(std=0.3)
        for limit in {"limit", "swiglu_limit"} & set(vars(experts)):
            setattr(experts, limit, 0.75)  # a third of all values is beyond it
        H = experts.down_proj.shape[2 if experts.is_transposed else 1]
        x, weights = torch.randn(9, H).double(), torch.rand(9, 2).double()
        index = torch.randint(experts.num_experts, (9, 2))
        results = []
        # a few loops compute or add in fp32 for every dtype
        plain = "batched_mm" if re.search(r"float32|\.float\(", inspect.getsource(type(experts))) else "eager"
        for implementation in ("cumo", plain):
            experts.config._experts_implementation_internal = implementation
            leaf = x.clone().requires_grad_()
            with in_fp64() if name == "BeamExperts" else nullcontext():  # its gate is computed in fp32
                out = experts(leaf, index, weights)
            inputs = [leaf, *experts.parameters()]
            results.append([out, *torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)])
        assert integration.refusal(experts) is None, name
        fused[name] = integration.fused_activation(experts)
        assert_same_formula(*({name: values} for values in results))
        how = f"expert_mlp ({fused[name]})"
        if name in UNFUSED:
            how = f"grouped_gemm, {UNFUSED[name]}, grouped_gemm"
        how += ", its norm" if integration._has_norm(experts) else ""
        assert integration.explain(experts) == f": {how}"
    assert len(fused) > 50
    assert (fused["Lfm2MoeExperts"], fused["Gemma4TextExperts"]) == ("swiglu", "geglu_tanh")
    assert fused["NemotronHExperts"] == "relu2"
    oai = "swiglu_oai(alpha=1.702,limit=0.75)"
    assert fused["GptOssExperts"] == oai.replace(")", ",interleaved)")
    assert fused["OpenAIPrivacyFilterExperts"] == fused["MiniMaxM3VLExperts"] == oai
    clamped = [fused[name] for name in ("DeepseekV4Experts", "HYV4Experts", "Glm5NextTextExperts")]
    assert set(clamped) == {"swiglu_clamped(limit=0.75)"}
    missing = {name for name in integration.OWN_GATES if name.partition(".")[0] not in fused}
    assert missing <= {f"{name}._apply_gate" for name in ("Step3p7Experts", "BeamExperts", "HYV4VLExperts")}


@pytest.mark.parametrize("limit", [0.75, None])
def test_the_gate_of_step_is_known_where_its_class_has_the_interface(limit):
    step = pytest.importorskip("transformers.models.step3p7.modeling_step3p7")
    kind = type("Step3p7Experts", (step.Step3p7Experts,), {"forward": step.Step3p7Experts.forward})
    config = MixtralConfig(**SIZES, num_local_experts=4, hidden_act="silu")
    config.moe_intermediate_size = 24
    experts = use_experts_implementation(kind)(config, swiglu_limit=limit).double()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3)
    x, index, weights = torch.randn(9, 32).double(), torch.randint(4, (9, 2)), torch.rand(9, 2).double()
    wanted = step.Step3p7Experts.forward(experts, x, index, weights)
    config._experts_implementation_internal = "cumo"
    assert_same_formula(experts(x, index, weights), wanted)
    known = "clamped_swiglu(limit=0.75)" if limit else "swiglu"
    assert integration.explain(experts) == f": expert_mlp ({known})"


class OtherGate(MixtralExperts):
    """A model's own gate function that no table knows."""

    def _apply_gate(self, z):
        gate, up = z.chunk(2, dim=-1)
        return torch.tanh(gate) * up


def test_a_gate_function_that_is_not_known_runs_between_two_products():
    experts = mixtral_experts(kind=OtherGate).double()
    x, index, weights = torch.randn(6, 32).double(), torch.randint(4, (6, 2)), torch.rand(6, 2).double()
    wanted = torch.zeros(6, 32).double()
    for k in range(2):
        for t, e in enumerate(index[:, k]):
            hidden = experts._apply_gate(experts.gate_up_proj[e] @ x[t])
            wanted[t] += weights[t, k] * (experts.down_proj[e] @ hidden)
    assert_same_formula(experts(x, index, weights), wanted)
    assert integration.explain(experts) == f": {OWN_GATE}"


def test_a_gate_of_another_module_is_not_taken_for_that_of_transformers(make):
    _, experts = experts_of(make("gpt_oss"))[0]
    assert integration.known_activation(experts) == GPT_OSS
    own = lambda self, z: z[..., ::2] * z[..., 1::2]
    own.__qualname__ = "GptOssExperts._apply_gate"  # a copy with another formula, say in code of a checkpoint
    experts.__class__ = type("GptOssExperts", (type(experts),), {"_apply_gate": own})
    assert integration.known_activation(experts) is None


@pytest.mark.parametrize("limit", [None, "7", 0.0, float("nan"), float("inf")])
def test_limits_that_cannot_be_read_leave_the_gate_to_the_class(make, limit):
    _, experts = experts_of(make("gpt_oss"))[0]
    experts.limit = limit
    assert integration.known_activation(experts) is None


def test_experts_with_different_limits_compile_to_graphs_of_their_own(make):
    torch._dynamo.reset()
    _, experts = experts_of(make("gpt_oss"))[0]
    x, index, weights = torch.randn(11, 32), torch.randint(4, (11, 2)), torch.rand(11, 2)
    counter, layers = CompileCounterWithBackend("aot_eager"), []
    for limit in (7.0, 0.75, 0.25):
        layers.append(copy.deepcopy(experts))
        layers[-1].limit = limit
    for _ in range(2):
        outs = [torch.compile(e, fullgraph=True, backend=counter)(x, index, weights) for e in layers]
        assert counter.frame_count <= 4  # dynamo begins anew once, when it has taken a limit for a variable
    assert all(torch.equal(out, e(x, index, weights)) for out, e in zip(outs, layers, strict=True))
    assert not torch.equal(outs[1], outs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_of_transposed_and_interleaved_weights_have_their_layout(make, dtype):
    _, experts = experts_of(make("gpt_oss"))[0]
    experts, x = experts.to(dtype), torch.randn(11, 32, dtype=dtype, requires_grad=True)
    index, weights = torch.randint(4, (11, 2)), torch.rand(11, 2, dtype=dtype)
    experts(x, index, weights).sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


def test_a_norm_of_each_experts_rows_comes_before_the_weights():
    """Models of transformers 5.20 and later have one; here on Mixtral's experts, compared to a plain loop."""
    experts = mixtral_experts().double()
    experts.has_post_expert_norm = True
    experts.post_expert_norm = torch.nn.LayerNorm(32).double()
    torch.nn.init.normal_(experts.post_expert_norm.weight)
    x, index, weights = torch.randn(6, 32).double(), torch.randint(4, (6, 2)), torch.rand(6, 2).double()
    wanted = torch.zeros(6, 32).double()
    for k in range(2):
        for t, e in enumerate(index[:, k]):
            gate, up = (experts.gate_up_proj[e] @ x[t]).chunk(2)
            row = experts.post_expert_norm(experts.down_proj[e] @ (experts.act_fn(gate) * up))
            wanted[t] += weights[t, k] * row
    assert_same_formula(experts(x, index, weights), wanted)
    assert integration.explain(experts) == ": grouped_gemm, swiglu, grouped_gemm, its norm"


def test_models_without_experts_are_named():
    assert "has no experts" in integration.explain(torch.nn.Linear(2, 2))
