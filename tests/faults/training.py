"""Faults in the rooms training and demo, and in the command line."""

from tests.faults import Fault

FAULTS: tuple[Fault, ...] = ()
