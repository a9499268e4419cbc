"""Other people's kernels, as variants of our cases."""
