"""What the service knows of its store, kept current."""
