"""Which experts tokens and patches go to, measured and drawn."""
