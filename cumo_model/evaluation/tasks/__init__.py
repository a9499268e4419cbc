"""Benchmarks: each module reads one's official files, scores answers, and writes what its server takes."""
