"""Activation (CUDA): the launchers of csrc/activation.cu."""

from cumo_kernels.extension import load

activate = load().activate
activate_backward = load().activate_backward
