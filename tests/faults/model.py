"""Faults in the room model."""

from tests.faults import Fault

FAULTS: tuple[Fault, ...] = ()
