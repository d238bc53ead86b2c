"""Messages and preferences become a request."""
