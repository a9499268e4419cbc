"""Text logits and tokens of CuMo are those of the decoder's own CausalLM; others are refused by name."""

import copy
import inspect
import pickle
import re
import sys
import types

import pytest
import torch
import transformers
from packaging import version
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    OPTConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cumo_model import CumoConfig, CumoForConditionalGeneration
from cumo_model.model import head as head_module
from cumo_model.model.head import head_of
from cumo_model.model.llm_moe import build_language_model
from tests.model.decoders import REFUSED, RUN, SIZES, VOCABULARY, WITHOUT, decoder_config
from tests.rounding import assert_same_formula, in_fp64

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}


def with_decoder(text_config) -> CumoForConditionalGeneration:
    config = CumoConfig(vision_config=TOWER, text_config=text_config, image_token_index=60)
    return CumoForConditionalGeneration(config).eval()


def own_and_ours(text_config):
    """The decoder's own CausalLM, and a CuMo with the same weights."""
    own_config = copy.deepcopy(text_config)
    own_config._experts_implementation = "eager"  # of mixtral; the default has no fp64
    own = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)](own_config).eval()
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if "norm" not in name and parameter.ndim:
                parameter.normal_(std=0.2)
    ours, head = with_decoder(text_config), head_of(text_config)
    ours.model.language_model.load_state_dict(own.get_submodule(head.decoder).state_dict())
    ours.lm_head.load_state_dict(own.get_submodule(head.weight).state_dict())
    return own, ours


def padded_rows():
    """Two rows of 9 tokens; the first three of one row are padding."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :3] = mask[0, :3] = 0
    return ids, mask


LISTED = (5, 17)  # the release of transformers of which decoders.py lists all models
MANY_KERNELS = {
    "bamba",
    "deepseek_v32",
    "glm_moe_dsa",
    "granitemoehybrid",
    "hrm_text",
    "zamba",
}  # seconds each
EVERY = [
    pytest.param(kind, marks=pytest.mark.slow) if kind in MANY_KERNELS else kind
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind != CumoConfig.model_type
]


@pytest.mark.parametrize("model_type", EVERY)
def test_every_causal_language_model_runs_as_its_own_or_is_refused(model_type):
    """The lists of decoders.py are those of LISTED; models of another release may have become able to run."""
    if model_type in WITHOUT:
        pytest.skip("no tiny configuration")
    listed = version.parse(transformers.__version__).release[:2] == LISTED
    try:
        config = decoder_config(model_type)
    except Exception as error:
        assert not listed or (model_type not in RUN and model_type not in REFUSED), error
        pytest.skip(f"no tiny configuration of a model of another release: {error}")
    try:
        head_of(config)
    except ValueError as refused:
        assert model_type not in RUN, refused
        assert repr(config.model_type) in str(refused) and "text_config" in str(refused)
        if listed or model_type in REFUSED:
            assert re.search(REFUSED[model_type], str(refused)), refused
        with pytest.raises(ValueError, match=re.escape(str(refused))):
            with_decoder(config)
        return
    assert not listed or model_type in RUN
    own, ours = own_and_ours(config)
    is_tied = own.get_output_embeddings().weight is own.get_input_embeddings().weight
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == is_tied
    ids, mask = padded_rows()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    rows = ({}, {"attention_mask": mask})
    for more in rows:
        try:
            wanted = own.generate(ids, **more, **options)
        except Exception as error:
            assert not listed, error
            pytest.skip(f"its own generate does not run with this configuration: {error}")
        assert torch.equal(ours.generate(ids, **more, **options), wanted)
    own, ours = own.double(), ours.double()
    with in_fp64(), torch.no_grad():
        for more in rows:
            kept = mask.bool() if more else torch.ones_like(mask).bool()
            assert_same_formula(ours(ids, **more).logits[kept], own(ids, **more).logits[kept])


def test_every_expectation_is_about_one_model():
    assert not set(RUN) & set(REFUSED) and not set(WITHOUT) & (set(RUN) | set(REFUSED))
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) >= {"cohere", "gpt2"}


@pytest.mark.parametrize("model_type", ["cohere", "gemma2", "granite", "phi", "minicpm3", "mistral"])
def test_the_loss_without_logits_has_the_same_head(model_type, fp64):
    _, ours = own_and_ours(decoder_config(model_type))
    ids, _ = padded_rows()
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    with torch.no_grad():
        losses = [ours(ids, labels=labels, skip_logits=skip).loss for skip in (False, True)]
        assert_same_formula(ours(ids, logits_to_keep=1).logits[:, 0], ours(ids).logits[:, -1])
    assert_same_formula(*losses)


@pytest.fixture
def register(monkeypatch):
    """Make transformers know a model: a configuration class, its decoder and its CausalLM."""

    def add(causal, decoder=LlamaModel, **fields):
        config = type("OtherConfig", (LlamaConfig,), {"model_type": "other", "__module__": __name__})
        monkeypatch.setitem(MODEL_MAPPING._extra_content, config, decoder)
        monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, config, causal)
        made = config(**SIZES)
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    return add


def changed(change):
    """A LlamaForCausalLM whose logits are changed."""

    class OtherForCausalLM(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = change(self, output.logits)
            return output

    return OtherForCausalLM


@pytest.mark.parametrize(
    "change",
    [
        lambda self, logits: logits * 0.5,
        lambda self, logits: logits + 1,
        lambda self, logits: logits.log_softmax(-1),
        lambda self, logits: logits * self.config.logit_scale * 2,
        lambda self, logits: logits[..., :-1],
    ],
    ids=["scale", "shift", "softmax", "twice", "cut"],
)
def test_a_head_that_is_not_known_is_refused(register, change):
    config = register(changed(change), logit_scale=0.25)
    with pytest.raises(
        ValueError, match=r"got 'other': what OtherForCausalLM does .* is none of what is known"
    ):
        build_language_model(config)


def test_a_known_field_is_applied_for_a_model_that_is_not_known(register):
    config = register(changed(lambda self, logits: logits / self.config.logit_scale), logit_scale=0.25)
    with pytest.raises(ValueError, match="none of what is known"):
        head_of(config)  # the field is known, but not to divide
    config = register(changed(lambda self, logits: logits * self.config.logit_scale), logit_scale=0.25)
    assert head_of(config).steps == (("logit_scale", ("logits", "multiply"), 0.25),)


def test_a_decoder_that_computes_with_token_ids_is_refused(register):
    class OtherModel(LlamaModel):
        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
            if inputs_embeds is None:
                inputs_embeds = self.embed_tokens(input_ids) * 3.0
            return super().forward(attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)

        forward.__signature__ = inspect.signature(LlamaModel.forward)

    class OtherForCausalLM(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model = OtherModel(config)

    with pytest.raises(ValueError, match=r"got 'other': its decoder computes something else .* \(mul\)"):
        head_of(register(OtherForCausalLM, OtherModel))


def test_a_causal_language_model_that_changes_its_inputs_is_refused(register):
    class OtherForCausalLM(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            return super().forward(inputs_embeds=self.model.embed_tokens(input_ids.to("meta")), **kwargs)

    with pytest.raises(ValueError, match="gives its decoder other inputs than input_ids"):
        head_of(register(OtherForCausalLM))


def test_an_embedding_of_another_width_is_refused():
    config = OPTConfig(**SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16})
    with pytest.raises(
        ValueError,
        match=r"text_config.hidden_size must be .* word_embed_proj_dim 16 and 16, got 32 for 'opt'",
    ):
        with_decoder(config)


def test_an_embedding_that_the_model_cannot_tie_is_refused(register):
    class OtherForCausalLM(LlamaForCausalLM):
        _tied_weights_keys = {}

    config = register(OtherForCausalLM, tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match=r"text_config.tie_word_embeddings must be False for 'other', .* got True"
    ):
        head_of(config)


def test_the_examination_leaves_no_trace():
    config = decoder_config("cohere", hidden_size=64)
    before, values = torch.get_rng_state(), config.to_dict()
    with torch.device("meta"):
        head = head_of(config)
    assert torch.equal(torch.get_rng_state(), before) and config.to_dict() == values
    assert torch.get_default_dtype() == torch.float32
    assert head_of(config) is head and pickle.loads(pickle.dumps(head)) == head


def test_zero_init_of_deepspeed_is_suspended(monkeypatch):
    """It would partition the parameters of the model that is examined."""
    calls, place = [], "deepspeed.runtime.zero.partition_parameters"
    module = types.ModuleType(place)
    module.shutdown_init_context = lambda: calls.append("shutdown")
    module.restore_init_context = lambda: calls.append("restore")
    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, place, module)
    monkeypatch.setattr(head_module, "is_deepspeed_zero3_enabled", lambda: True)
    skeleton = head_module._skeleton
    monkeypatch.setattr(head_module, "_skeleton", lambda config: calls.append("build") or skeleton(config))
    head_of(decoder_config("mistral", hidden_size=48))
    with pytest.raises(ValueError, match="falcon_h1"):
        head_of(decoder_config("falcon_h1", vocab_size=60))
    assert calls == ["shutdown", "build", "restore"] * 2


def test_the_values_of_the_configuration_decide(fp64):
    """gemma2's cap is a field, so two configurations have two heads."""
    heads = [head_of(decoder_config("gemma2", final_logit_softcapping=cap)) for cap in (None, 3.0, 5.0)]
    assert [len(head.steps) for head in heads] == [0, 1, 1] and len(set(heads)) == 3
    own, ours = own_and_ours(decoder_config("gemma2", final_logit_softcapping=5.0))
    assert type(own) is Gemma2ForCausalLM
    ids, _ = padded_rows()
    with torch.no_grad():
        got = ours(ids).logits
        assert_same_formula(got, own(ids).logits)
    assert got.abs().max() < 5


@pytest.mark.parametrize("kind", ["dynamic", "linear", "yarn"])
def test_a_decoder_whose_rope_has_a_state_is_not_refused(kind):
    config = MistralConfig(**SIZES, rope_parameters={"rope_type": kind, "factor": 4.0, "rope_theta": 1e4})
    assert head_of(config).steps == ()
