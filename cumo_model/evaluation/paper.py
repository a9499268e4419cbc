"""Figures of the paper's main table, to be printed beside ours.

Source: Table 1 of "CuMo: Scaling Multimodal LLM with Co-Upcycled Mixture-of-Experts" (Li et al., arXiv
2405.05949), read in a copy of its text; all but MathVista were also read in the version of NeurIPS 2024,
which has no column for it, and are the same there. Greedy decoding. MM-Vet, LLaVA-Bench and MathVista are
means of three runs of a judge: gpt-4-0613 for LLaVA-Bench, gpt-3.5-turbo for MathVista.
"""

MODELS = ("CuMo-7B", "CuMo-8x7B")  # on Mistral-7B and on Mixtral-8x7B
TABLE: dict[str, tuple[float, float]] = {  # task -> figures of MODELS
    "scienceqa": (73.9, 77.9),
    "textvqa": (67.0, 66.0),
    "gqa": (64.9, 63.8),
    "pope": (86.7, 85.7),
    "mme": (1548.6, 1639.5),
    "mmbench": (73.0, 75.3),
    "mmbench_cn": (66.6, 68.0),
    "mmvet": (51.0, 48.7),
    "vqav2": (82.2, 81.8),
    "llava_bench": (85.7, 84.7),
    "seed": (72.1, 73.2),
    "mmmu": (39.1, 45.0),
    "mathvista": (35.1, 38.2),
}
