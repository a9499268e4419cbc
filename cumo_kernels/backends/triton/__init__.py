"""Triton kernels, the same five stems as every backend; `common` holds what they share."""
