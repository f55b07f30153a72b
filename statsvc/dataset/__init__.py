"""The dataset's own side: which dataset shards there are, their samples in order, and the pixels of a view.

Workers and students read images through this one package, so that both see the same samples and the same pixels.
"""
