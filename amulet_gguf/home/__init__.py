"""The user's own files and configuration."""
