"""The phases of a run: one file each, over what they share in base."""
