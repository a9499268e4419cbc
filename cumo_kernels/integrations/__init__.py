"""Doors into other libraries, opened by importing them."""
