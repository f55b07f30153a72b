"""Is a store whole, and how to restore it."""
