"""MoEHostMixin: what a model of transformers must do differently if its experts are MoELayers.

Every model class of this package with experts has it: whole models, vision tower and Mixtral decoder.
"""

from collections.abc import Sequence

import torch
from torch import nn

from cumo_model.model.compat import EitherCheckpointing, enable_checkpointing
from cumo_model.model.indexes import check_indexes
from cumo_model.model.moe import IMPLEMENTATIONS, MoELayer
from cumo_model.model.quantize import prepare_to_save
from cumo_model.model.recording import RoutingRecord
from cumo_model.model.remote import RemoteCodeMixin, opening_anywhere


class MoEHostMixin(RemoteCodeMixin, EitherCheckpointing):
    """Overrides for transformers models whose experts are MoELayers."""

    _keep_in_fp32_modules_strict = {"selection_bias"}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load as transformers does.

        Raises:
            ValueError: an index of the folder is damaged or names a file outside the folder.
        """
        check_indexes(pretrained_model_name_or_path, kwargs.get("subfolder"))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def post_init(self) -> None:
        super().post_init()
        self._spread_experts_implementation()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For custom code transformers skips modules without direct parameters, and so the initialisation of
        # every block. That rule is for classes whose _init_weights would overwrite loaded weights.
        super()._initialize_weights(module, is_custom_code=False)

    def save_pretrained(
        self,
        save_directory,
        *args,
        save_original_format: bool = False,
        remote_code: bool | None = None,
        **kwargs,
    ):
        """Save as transformers does, with the names and shapes of this model's state_dict.

        Experts are saved as stacked tensors, so that `load_state_dict` can read them; the Trainer resumes
        this way. `save_original_format=True` writes one tensor per expert of Mixtral. `remote_code=True`
        makes a folder that also opens with `trust_remote_code=True` where this package was not imported; so
        does a model that was loaded from such a folder, unless it is False. Experts in four bits are saved as
        they are.

        Raises:
            ValueError: bitsandbytes has quantised weights beside experts in four bits, or these are to be
                saved in the original format. Or remote_code is True for a part that cannot be opened by
                itself.
        """
        if prepare_to_save(self) and save_original_format:
            raise ValueError("save_original_format must be False for experts in four bits, got True")
        with opening_anywhere(self.config, remote_code):  # the config writes the module
            # not the mixin's, which is for what has its auto_map in itself
            return super(RemoteCodeMixin, self).save_pretrained(
                save_directory, *args, save_original_format=save_original_format, **kwargs
            )

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **kwargs) -> None:
        """As in transformers; ValueError for use_reentrant where there are experts."""
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if options["use_reentrant"] is not False and any(isinstance(m, MoELayer) for m in self.modules()):
            raise ValueError(
                "activation_checkpointing_kwargs (gradient_checkpointing_kwargs) must have use_reentrant "
                f"False where there are experts, got {options['use_reentrant']} for "
                f"{type(self).__name__}: reentrant recomputation loses the gradients of the router losses"
            )
        noise = any(isinstance(m, MoELayer) and (m.router.jitter or m.router.noisy) for m in self.modules())
        if noise and options.get("preserve_rng_state", True) is not True:
            raise ValueError(
                "activation_checkpointing_kwargs (gradient_checkpointing_kwargs) must have "
                f"preserve_rng_state True to repeat router noise, got {options['preserve_rng_state']}"
            )
        enable_checkpointing(self, options, **kwargs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The implementation of the experts; transformers calls this wherever one is chosen.

        Args:
            requested_experts: "cumo" (cumo_kernels, the default), or "eager", a loop over experts in plain
                PyTorch. Routers always run in cumo_kernels.

        Raises:
            ValueError: another name, or "eager" while the experts are spread over processes.
        """
        name = "cumo" if requested_experts is None else requested_experts
        if name not in IMPLEMENTATIONS:
            raise ValueError(
                f"experts_implementation must be {' or '.join(map(repr, IMPLEMENTATIONS))} for "
                f"{type(self).__name__}, got {requested_experts!r}"
            )
        if name == "eager" and any(hasattr(module, "exchange") for module in self.modules()):
            raise ValueError(
                "experts_implementation must be 'cumo' where experts are spread over processes, got 'eager'"
            )
        return name

    def set_experts_implementation(self, experts_implementation: str | dict) -> None:
        """As in transformers; names as in `get_correct_experts_implementation`."""
        super().set_experts_implementation(experts_implementation)
        self._spread_experts_implementation()

    def _spread_experts_implementation(self) -> None:
        """Tell every MoELayer the implementation that the configuration of its innermost model names."""
        for host in self.modules():  # from the outermost to the innermost
            if isinstance(host, MoEHostMixin):
                for layer in host.modules():
                    if isinstance(layer, MoELayer):
                        layer.experts.implementation = host.config._experts_implementation


def check_router_gradients(model: nn.Module, records: Sequence[RoutingRecord]) -> None:
    """Check that the router losses of a training step reach the gates.

    Reentrant recomputation runs layers without gradients. `activation_checkpointing_enable` refuses it, but a
    caller can also wrap layers with it.

    Raises:
        ValueError: a trained gate ran without gradients in a step that has them.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    lost = {(r.place, r.layer) for r in records if not r.routing.stats.mean_probs.requires_grad}
    if not lost:
        return
    for name, layer in model.named_modules():
        if (
            isinstance(layer, MoELayer)
            and (layer.place, layer.layer) in lost
            and any(p.requires_grad for p in layer.gate.parameters())
        ):
            raise ValueError(
                f"use_reentrant must be False where there are experts: {name} ran without gradients, so the "
                "router losses would not train its gate (a part that is run under torch.no_grad() on purpose "
                "must have requires_grad_(False))"
            )
