"""Tile sizes of the GEMMs by GPU, and measured timings."""
