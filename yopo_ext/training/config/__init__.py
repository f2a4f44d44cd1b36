"""What can be set, its defaults, and what is refused."""
