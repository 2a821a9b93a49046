"""Two views of one image: geometry, augmentation, batches."""
