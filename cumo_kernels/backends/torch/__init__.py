"""What torch itself has for grouped products, `torch.nn.functional.grouped_mm`, with plain torch around it.

No shape depends on data and nothing asks the host, as far as grouped_mm does not (see grouped_gemm.py), so
calls are captured in CUDA graphs. On a GPU it runs what no kernel of ours is proven for.
"""
