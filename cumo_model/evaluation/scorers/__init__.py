"""Scorers of benchmarks: functions of texts that need the standard library only."""
