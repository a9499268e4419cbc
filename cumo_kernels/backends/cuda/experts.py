"""Expert MLPs (CUDA): csrc/experts_layer.h runs the layer with the kernels of csrc/."""

from cumo_kernels.extension import load

expert_mlp = load().expert_mlp
expert_mlp_backward = load().expert_mlp_backward
