"""The model: configuration, MoE layer, losses, vision tower, connector and language model."""
