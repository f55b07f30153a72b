"""A store behind the statsvc service."""
