"""Tests of stores as a whole."""
