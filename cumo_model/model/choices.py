"""Names that settings choose from. This module needs no torch, so that a command can check them at once."""

AVERAGES = ("tokens", "micro_batches")  # average_loss_over
COMPATS = ("cumo",)
DTYPES = ("float32", "bfloat16", "float16", "float64")
ASPECTS = ("pad", "square")  # image_aspect_ratio without tiles
GROUPINGS = ("modality_length", "length", "none")  # of the rows of a batch
EXCHANGES = ("exact", "padded")  # of the rows of expert parallelism
