"""Measures of what realignment does to answers."""
