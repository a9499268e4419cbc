"""Interactive use of a checkpoint."""
