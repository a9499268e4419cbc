"""CuMo under the common tests of transformers: models, towers and processors, and their peers Llava and CLIP.

`run.py` copies this file into a temporary project in which the package `tests` is that of transformers.
"""

import copy
import random
import tempfile
import unittest
import unittest.mock

import torch
from stand_ins import import_tests
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from tests.test_processing_common import ProcessorTesterMixin
from transformers import CLIPVisionModel, LlavaProcessor
from transformers.models.auto import modeling_auto
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from cumo_model import (
    CumoConfig,
    CumoForConditionalGeneration,
    CumoModel,
    CumoVisionConfig,
    CumoVisionModel,
)
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing import CumoImageProcessor, CumoProcessor
from cumo_model.processing.conversation import chat_template

IMAGE_TOKEN, PAD = 0, 1  # within the vocabulary, as in Llava's tests, because some tests clamp the ids
OUTSIDE = 110  # not in the vocabulary, as in the released checkpoints
TEXT = {
    "model_type": "mistral",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "sliding_window": None,
    "pad_token_id": PAD,
}
VISION = {
    "image_size": 8,
    "patch_size": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


# the tests know by these names which class has a loss and which has none
modeling_auto.MODEL_MAPPING_NAMES["cumo"] = "CumoModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["cumo"] = "CumoForConditionalGeneration"


class CumoTester:
    """What the mixins ask of a `model_tester`: a small configuration, and inputs with pictures."""

    # 7 rows, because a test adds rows of random ids, without pictures, to fewer
    batch_size, is_training, seq_length_of_text = 7, True, 7

    def __init__(self, parent, experts: int = 1, text=(), **options):
        self.parent, self.options = parent, options
        self.text_config = {**TEXT, **dict(text)}
        self.vision_config = {**VISION, "num_experts": experts}
        self.options = {"projector_num_experts": experts, "image_token_index": IMAGE_TOKEN, **options}
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "pad_token_id"):
            setattr(self, name, self.text_config[name])
        self.image_size, self.num_channels = VISION["image_size"], 3
        self.image_token_id = self.image_token_index = self.options["image_token_index"]
        self.num_image_tokens = (VISION["image_size"] // VISION["patch_size"]) ** 2
        self.seq_length = self.encoder_seq_length = self.seq_length_of_text + self.num_image_tokens

    def get_config(self) -> CumoConfig:
        return CumoConfig(
            text_config=dict(self.text_config),
            vision_config=dict(self.vision_config),
            vision_feature_layer=-1,  # every layer gets a gradient
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self):
        config, size, rng = self.get_config(), self.image_size, random.Random(0)
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 2, rng=rng) + 2
        input_ids[:, : self.num_image_tokens] = config.image_token_index
        inputs = {
            "pixel_values": floats_tensor([self.batch_size, self.num_channels, size, size], rng=rng),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }
        return config, inputs


class CumoCase(ModelTesterMixin, GenerationTesterMixin):
    """The tests of both CuMo models. A variant is a subclass with the arguments of its tester."""

    all_model_classes = (CumoModel, CumoForConditionalGeneration)
    additional_model_inputs = ["pixel_values"]
    _is_composite = True
    arguments: dict = {}

    def setUp(self):
        arguments = dict(self.arguments)
        name = self._testMethodName
        if "rope_scaling" in name:  # its random ids have no pictures
            arguments["image_token_index"] = OUTSIDE
        if "inputs_embeds" in name or "resize" in name:  # these embed or clamp the ids
            arguments["image_token_index"] = IMAGE_TOKEN
        if "eager_matches_sdpa" in name:
            # with all experts, rounding in fp16 does not change a choice, and so the whole feature of a patch
            arguments["projector_num_experts_per_tok"] = arguments["experts"]
        self.model_tester = CumoTester(self, **arguments)
        names = ["image_token_index", "vision_feature_layer", "scales"]
        self.config_tester = ConfigTester(
            self, config_class=CumoConfig, has_text_modality=False, common_properties=names
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """As in the mixin, but with labels that are not image tokens, which are never predicted."""
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels and model_class is CumoForConditionalGeneration:
            inputs["labels"] = copy.deepcopy(inputs["input_ids"])
        return inputs

    def test_can_init_all_missing_weights(self):
        """The mixin skips models by the year in the head of their configuration's file."""
        with tempfile.NamedTemporaryFile("w") as head:
            head.write("# Copyright 2026\n")
            head.flush()
            with unittest.mock.patch("inspect.getfile", return_value=head.name):
                super().test_can_init_all_missing_weights()

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_vision_feature_layers(self):
        for layers in (-1, [-1], [-1, -2]):
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            config.vision_feature_layer = layers
            for model_class in self.all_model_classes:
                model = model_class(config).eval()
                width = config.vision_config.hidden_size * len(config.scales)
                wanted = width * (1 if isinstance(layers, int) else len(layers))
                self.assertEqual(getattr(model, "model", model).multi_modal_projector.input_size, wanted)
                model(**inputs)

    def test_mismatching_num_image_tokens(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            for wrong in (inputs["pixel_values"][:1], torch.cat([inputs["pixel_values"]] * 2)):
                with self.assertRaises(ValueError):
                    model(**{**inputs, "pixel_values": wrong})
            model(**inputs)


class DenseModelTest(CumoCase, unittest.TestCase):
    """No experts: Llava with CuMo's classes."""

    arguments = {"experts": 1, "scales": [1]}


class MoEModelTest(CumoCase, unittest.TestCase):
    """CLIP-MoE and MLP-MoE on Mistral, at two scales."""

    arguments = {"experts": 4, "scales": [1, 2]}


class MixtralModelTest(CumoCase, unittest.TestCase):
    """Experts in all three places; the image token is outside the vocabulary."""

    arguments = {
        "experts": 4,
        "image_token_index": OUTSIDE,
        "scales": [1],
        "text": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    }


class LlavaModelTest(
    import_tests("tests.models.llava.test_modeling_llava").LlavaForConditionalGenerationModelTest
):
    """Llava's own test class, for comparison."""


clip = import_tests("tests.models.clip.test_modeling_clip")


class ClipModelTest(clip.CLIPVisionModelTest):
    """CLIP's own test class, for comparison."""

    all_model_classes = (CLIPVisionModel,)


class TowerTester(clip.CLIPVisionModelTester):
    def __init__(self, parent, experts: int):
        super().__init__(parent, batch_size=3, image_size=12)
        self.experts = experts

    def get_config(self) -> CumoVisionConfig:
        values = super().get_config().to_dict()
        return CumoVisionConfig(**{**values, "model_type": "cumo_vision_model", "num_experts": self.experts})


class DenseTowerModelTest(clip.CLIPVisionModelTest):
    """The tower without experts."""

    all_model_classes = (CumoVisionModel,)
    experts = 1
    test_model = test_model_with_projection = None  # of CLIP's classes only

    def setUp(self):
        self.model_tester = TowerTester(self, self.experts)
        self.config_tester = ConfigTester(
            self, config_class=CumoVisionConfig, has_text_modality=False, hidden_size=48
        )


class TowerModelTest(DenseTowerModelTest):
    """The tower with experts."""

    experts = 4


class ProcessorCase(ProcessorTesterMixin):
    """Processor with a tokenizer trained here, because nothing is downloaded.

    Four tokens per tile: some tests truncate the text to a length that they give."""

    side, patch = 336, 168
    processor_options: dict = {}

    @classmethod
    def _setup_tokenizer(cls):
        return train_tokenizer(["lower newer upper older longer string what is the image"], 400)

    @classmethod
    def prepare_processor_dict(cls):
        return {
            "patch_size": cls.patch,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "chat_template": chat_template("vicuna_v1"),
            **cls.processor_options,
        }


class CumoProcessorCase(ProcessorCase):
    processor_class = CumoProcessor
    image_options: dict = {}

    @classmethod
    def _setup_image_processor(cls):
        side = cls.side
        size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        return CumoImageProcessor(**size, **cls.image_options)


class CumoProcessorTest(CumoProcessorCase, unittest.TestCase):
    """Each picture is one tile."""


class AnyresProcessorTest(CumoProcessorCase, unittest.TestCase):
    """Pictures are cut into tiles, with a newline after each row."""

    image_options = {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672]],
    }
    processor_options = {"patch_merge_type": "spatial_unpad"}


class LlavaProcessorTest(ProcessorCase, unittest.TestCase):
    """Llava's processor with the same tokenizer, for comparison."""

    processor_class = LlavaProcessor

    @classmethod
    def _setup_image_processor(cls):
        side = cls.side
        return LlavaImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
