"""Torch modules and functions for a student: normalizations, losses, decoding, resampling."""
