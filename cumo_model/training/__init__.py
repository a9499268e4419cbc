"""Stages of training: recipes, the Trainer, recovery, engines."""
