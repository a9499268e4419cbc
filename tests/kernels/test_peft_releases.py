"""What cumo_kernels uses of peft that is not documented, other releases of peft, and orders of imports."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from cumo_kernels.integrations import peft as integration
from tests.kernels.adapted_experts import E, H, Holder, I, config_of

peft = pytest.importorskip("peft")
layer = pytest.importorskip("peft.tuners.lora.layer")


def test_what_is_used_of_peft():
    """What cumo_kernels/integrations/peft.py relies on beside peft's documentation. See RELIES_ON there."""
    assert layer.ParamWrapper._runs_on_cumo
    assert integration._unlike(layer.ParamWrapper) is None
    wrapper = peft.get_peft_model(Holder("mixtral"), config_of("mixtral")).base_model.model.experts
    assert isinstance(wrapper, layer.ParamWrapper) and isinstance(wrapper.base_layer, layer.ParamWrapper)
    assert (wrapper.parameter_name, wrapper.base_layer.parameter_name) == ("down_proj", "gate_up_proj")
    assert wrapper.get_base_layer() is wrapper.base_layer.base_layer
    assert wrapper.lora_A["default"].weight.shape == (E * 3, I)
    assert wrapper.lora_B["default"].weight.shape == (H, 3 * E)
    assert (wrapper.num_experts, wrapper.r, wrapper.scaling) == (E, {"default": 3}, {"default": 5 / 3})
    assert isinstance(wrapper.lora_dropout["default"], nn.Identity)
    assert (wrapper.merged, wrapper.merged_adapters, wrapper.active_adapters) == (False, [], ["default"])


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda kind: setattr(kind, "_activate_lora", None), "it has no method _activate_lora"),
        (lambda kind: setattr(kind, "merge", lambda self: None), "its method merge has no parameter safe_"),
        (lambda kind: setattr(kind, "get_delta_weight", _other_layout), "its lora_A and lora_B have another"),
    ],
    ids=["removed", "renamed", "another-layout"],
)  # fmt: skip
def test_a_release_that_has_changed_keeps_its_own_way(monkeypatch, change, reason):
    methods = {name: vars(layer.ParamWrapper).get(name) for name in integration.RELIES_ON}
    own = {name: getattr(method, "__wrapped__", method) for name, method in methods.items() if method}
    fresh = type("ParamWrapper", (layer.ParamWrapper,), {**own, "_runs_on_cumo": False})
    monkeypatch.setattr(layer, "ParamWrapper", fresh)
    change(fresh)
    with pytest.warns(UserWarning, match=f"does not support peft .*: {reason}"):
        assert not integration.install()
    assert not fresh._runs_on_cumo


def _other_layout(self, adapter_name):
    a, b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
    a, b = a.reshape(-1, self.num_experts, a.shape[1]), b.reshape(b.shape[0], -1, self.num_experts)
    delta = torch.einsum("ore,rei->eoi", b, a) * self.scaling[adapter_name]
    return delta if self._did_swap_in_out_features else delta.transpose(1, 2)


ORDERS = {
    "ours first": "import cumo_kernels.integrations.transformers, sys\n"
    "assert 'peft' not in sys.modules\nimport peft",
    "peft first": "import peft, cumo_kernels.integrations.transformers",
    "alone": "import cumo_kernels.integrations.peft, sys\n"
    "assert 'transformers' not in sys.modules\nimport peft",
    "a part": "import cumo_kernels.integrations.peft; from peft.tuners.lora.layer import ParamWrapper",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_it_is_installed_in_any_order_of_imports(order):
    check = (
        "\nimport sys, peft.tuners.lora.layer as layer\nassert layer.ParamWrapper._runs_on_cumo\n"
        "assert not [f for f in sys.meta_path if type(f).__name__ == '_Watch']"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", ORDERS[order] + check], check=True)
