"""Routing (CUDA): the launchers of csrc/routing.cu and csrc/sorting.cu."""

from cumo_kernels.extension import load

route = load().route
route_backward = load().route_backward
sort_by_expert = load().sort_by_expert
