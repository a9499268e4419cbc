"""Faults in the rooms checkpoints, analysis and serving."""

from tests.faults import Fault

FAULTS: tuple[Fault, ...] = ()
