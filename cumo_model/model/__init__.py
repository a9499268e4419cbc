"""The model: configuration, MoE layer, losses, tower, connector, language model. Stands on cumo_kernels."""
