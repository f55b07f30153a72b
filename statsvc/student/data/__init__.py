"""TargetDataset: images and cached targets as batches."""
