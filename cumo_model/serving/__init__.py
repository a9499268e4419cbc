"""Talk to a checkpoint."""
