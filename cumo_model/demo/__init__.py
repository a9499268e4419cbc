"""The demo: real small data, tiny pre-training, the three stages and their figures."""
