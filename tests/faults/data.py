"""Faults in the rooms processing and data."""

from tests.faults import Fault

FAULTS: tuple[Fault, ...] = ()
