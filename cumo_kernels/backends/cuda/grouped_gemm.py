"""Grouped GEMM (CUDA): the launchers of csrc/grouped_gemm.cu and csrc/weight_grad.cu."""

from cumo_kernels.extension import load

grouped_gemm = load().grouped_gemm
grouped_gemm_weight_grad = load().grouped_gemm_weight_grad
