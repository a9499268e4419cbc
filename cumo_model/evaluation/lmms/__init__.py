"""CuMo in lmms-eval."""
