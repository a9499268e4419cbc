"""Training: recipes, the Trainer, recovery of interrupted runs, and engines (DDP, FSDP2, DeepSpeed)."""
