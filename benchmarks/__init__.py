"""Benchmarks: cases as data, a correctness gate before every timing, results in committed CSV files."""
