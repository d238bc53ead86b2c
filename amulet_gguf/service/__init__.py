"""A model on a thread of its own."""
