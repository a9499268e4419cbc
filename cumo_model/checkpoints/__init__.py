"""Checkpoints: both layouts, conversion, assembly from parts, upcycling."""
