"""The driver: what a run still has to do, and doing it."""
