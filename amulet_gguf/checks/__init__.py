"""Is it well, and how fast is it."""
