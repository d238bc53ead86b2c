"""Rows of logits become a token: the method, and sampling. Knows numpy and numba alone."""
