"""Triton kernels, the same five stems as every backend; `common` has what they share."""
