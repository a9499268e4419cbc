"""Faults in LoRA on experts: the integration with peft, experts of transformers and of CuMo."""

from tests.faults import Fault

P, H = "cumo_kernels/integrations/peft.py", "cumo_kernels/integrations/transformers.py"
M, L = "cumo_model/model/", "cumo_model/training/"

FAULTS = (
    Fault("experts of peft's lora_B first", P, "rank, num_experts).permute(2, 0, 1)",
          "num_experts, rank).permute(1, 0, 2)", "peft", select="outputs_and_gradients"),
    Fault("scaling of adapters ignored", P, "return Adapter(a, b, wrapper.scaling[adapter_name], ",
          "return Adapter(a, b, 1.0, ", "peft", select="outputs_and_gradients"),
    Fault("adapters of the outer wrapper alone", P, "_given.active = (*before, (base,", "_given.active = ((base,",
          "peft", select="outputs_and_gradients"),
    Fault("only the first active adapter", P, "tuple(_factors(self, name) for name in names)",
          "tuple(_factors(self, name) for name in names[:1])", "peft", select="several_adapters"),
    Fault("adapters stay after a forward pass", P, "        finally:\n            _given.active = before\n",
          "        finally:\n            pass\n", "peft", select="outputs_and_gradients"),
    Fault("dropout also in evaluation", P, "isinstance(dropout, nn.Dropout) and dropout.training",
          "isinstance(dropout, nn.Dropout)", "peft", select="dropout_is_that"),
    Fault("dropout of a second adapter lost", P,
          "        original[\"update_layer\"](self, adapter_name, r, lora_alpha, config, **kwargs)\n"
          "        if dropout:\n",
          "        original[\"update_layer\"](self, adapter_name, r, lora_alpha, config, **kwargs)\n"
          "        if False:\n", "peft", select="dropout_is_that"),
    Fault("dropout dropped silently where peft computes", P, "                if dropout := _dropout_of(self, name):",
          "                if (dropout := 0):", "peft", select="dropout_is_refused"),
    Fault("a merge into packed weights forgets the packed ones", P,
          "weight.detach().copy_(self._packed_before)", "pass", "peft", select="four_bits"),
    Fault("each adapter of a merge not finite is added", P, "if safe and not total.isfinite().all():",
          "if False:", "peft", select="not_finite"),
    Fault("another layout of peft is not seen", P,
          "if delta.shape != wanted.shape or not torch.allclose(delta, wanted):", "if False:",
          "peft_releases", select="another"),
    Fault("adapters of down_proj are left out of fused experts", H, "up_adapters=of_up, down_adapters=of_down",
          "up_adapters=of_up", "peft", select="outputs_and_gradients"),
    Fault("adapters of up_proj are left out beside an own gate", H, "activation=known, adapters=of_up)",
          "activation=known)", "peft", select="outputs_and_gradients"),
)  # fmt: skip

FAULTS_OF_CUMO = (
    Fault("the eager loop ignores the scaling of adapters", M + "moe.py", "out + adapter.scaling * nn", "out + nn",
          "training/lora::test_experts_compute_with_the_factors_what_peft_does_with_the_sum"),
    Fault("the eager loop ignores dropout", M + "moe.py", "nn.functional.dropout(x, adapter.dropout)", "x",
          "training/lora::test_dropout_of_the_loop_is_that_of_the_kernels"),
    Fault("compat leaves out adapters", M + "moe.py", "bias=down_bias, adapters=of_down)", "bias=down_bias)",
          "training/lora::test_experts_compute_with_the_factors_what_peft_does_with_the_sum"),
    Fault("dropout of other parameters than of experts", L + "lora.py", "    _check_dropout(model, lora)\n", "",
          "training/values::test_only_experts_have_dropout_among_target_parameters"),
)  # fmt: skip
