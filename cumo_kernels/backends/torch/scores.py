"""Routing by scores (torch): the reference's, which synchronises nothing.

Contract: cumo_kernels/ops/scores.py.
"""

from cumo_kernels.backends.reference.scores import scored_route, scored_route_backward

__all__ = ["scored_route", "scored_route_backward"]
