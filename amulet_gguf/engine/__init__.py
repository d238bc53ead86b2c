"""The step: all live generations in one decode."""
