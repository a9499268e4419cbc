"""Tests of transformers that do not apply to CuMo, each with its reason."""

EXCEPTIONS: dict[str, str] = {}
