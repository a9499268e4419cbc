"""Faults in the rooms model, analysis and serving."""

from tests.faults import Fault

FAULTS: tuple[Fault, ...] = ()
