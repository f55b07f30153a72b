"""Statistics, transforms and codecs: arrays in, arrays out. Nothing here reads or writes a store."""
