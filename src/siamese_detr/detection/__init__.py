"""Boxes, matching and criteria: what pre-training and fine-tuning share."""
