"""Weights of preferences, learned from choices between answers."""
