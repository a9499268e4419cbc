"""Faults that tests.mutate plants, one replacement each, by the part of the project they are in."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    what: str
    path: str
    old: str  # occurs exactly once in the file
    new: str
    # kernels: stems whose tests run; cumo_model: files below tests/model without "test_" and ".py", each with
    # the names of its tests, such as "training/recover::test_a test_b; losses::test_c"
    tests: str
    select: str = ""  # pytest -k, to find the failure faster
    harmless: str = ""  # why no test can notice it, and why that does no harm
