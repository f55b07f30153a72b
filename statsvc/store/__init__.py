"""What a store is: its paths, arrays, records and commits, and the objects that read it."""
