"""Checks for users' own kernels: routings, the accuracy rule, uninitialised memory filled with NaN."""

from cumo_kernels.verification.accuracy import (
    PATTERNS,
    Accuracy,
    Yardstick,
    assert_as_accurate_as_torch,
    make_routing,
    poisoned_memory,
)

__all__ = [
    "PATTERNS",
    "Accuracy",
    "Yardstick",
    "assert_as_accurate_as_torch",
    "make_routing",
    "poisoned_memory",
]
