"""Which tile sizes a GEMM runs with on which GPU, and what was measured there."""
