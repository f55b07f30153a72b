"""The service: fitted transforms and feature shards over HTTP. Knows no torch and never touches a GPU."""
