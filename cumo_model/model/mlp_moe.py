"""The connector of vision tower and language model: a two-layer GELU MLP, dense or Mixture-of-Experts."""

from torch import Tensor, nn

from cumo_model.model.config import CumoConfig
from cumo_model.model.moe import MoELayer


class DenseMLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, input_size: int, output_size: int):
        super().__init__()
        self.fc1 = nn.Linear(input_size, output_size)
        self.fc2 = nn.Linear(output_size, output_size)

    def reset_parameters(self) -> None:
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class CumoProjector(nn.Module):
    """The connector: (B, n, feature_size of the config) -> (B, n, text hidden).

    It has no residual connection. Router statistics are per image.
    """

    def __init__(self, config: CumoConfig):
        super().__init__()
        self.input_size = config.feature_size
        output_size = config.text_config.hidden_size
        self.is_moe = config.projector_num_experts > 1
        if self.is_moe:
            self.mlp = MoELayer(
                self.input_size,
                output_size,
                config.projector_num_experts,
                config.projector_num_experts_per_tok,
                "gelu",
                output_size=output_size,
                compat=config.compat,
                place="mlp",
                router=config.router,
            )
        else:
            self.mlp = DenseMLP(self.input_size, output_size)

    def reset_parameters(self) -> None:
        """Initialise as nn.Linear does, like the original code; transformers would use N(0, 0.02)."""
        self.mlp.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim != 3 or features.shape[2] != self.input_size:
            raise ValueError(f"features must be (B, n, {self.input_size}), got {tuple(features.shape)}")
        return self.mlp(features, groups=features.shape[0]) if self.is_moe else self.mlp(features)
