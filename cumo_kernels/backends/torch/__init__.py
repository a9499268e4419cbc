"""torch's own grouped product, `torch.nn.functional.grouped_mm`, with plain torch operators around it.

No shape depends on data, and nothing synchronises with the host where grouped_mm does not (grouped_gemm.py),
so calls can be captured in CUDA graphs. On a GPU this backend runs the ops for which no kernel is verified.
"""
