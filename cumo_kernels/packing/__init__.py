"""Weights in four bits: the formats, a tensor that holds one, and the memory layouts of other libraries."""
