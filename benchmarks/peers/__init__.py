"""Third-party kernels, as variants of our cases."""
