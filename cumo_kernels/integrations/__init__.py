"""Integrations with other libraries; importing one registers it."""
