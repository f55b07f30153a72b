"""Sending the bytes of stored objects."""
