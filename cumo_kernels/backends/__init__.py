"""Implementations of the ops, one folder per backend: plain tensors in, plain tensors out."""
