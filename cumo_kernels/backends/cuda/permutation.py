"""Permutation (CUDA): the launchers of csrc/permutation.cu."""

from cumo_kernels.extension import load

permute = load().permute
combine = load().combine
combine_backward = load().combine_backward
