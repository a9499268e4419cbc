"""Evaluation: benchmarks, their scorers, hallucination, and the comparison of runs."""
