"""`statsvc estimate`: what a run will take and give."""
