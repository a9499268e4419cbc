"""Predictions from compiled code and data sheets: no GPU is needed, nothing is timed."""
