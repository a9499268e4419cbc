"""Faults in the rooms processing, data and checkpoints."""

from tests.faults import Fault

FAULTS: tuple[Fault, ...] = ()
