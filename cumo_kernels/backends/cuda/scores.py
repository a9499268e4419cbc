"""Routing by scores (CUDA): the launchers of csrc/routing.cu that have the scores of csrc/scores.cuh."""

from cumo_kernels.extension import load

scored_route = load().scored_route
scored_route_backward = load().scored_route_backward
