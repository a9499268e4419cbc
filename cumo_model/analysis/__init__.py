"""Analysis of routing: measure and plot which experts tokens and patches use."""
