"""Pre-training and fine-tuning runs."""
