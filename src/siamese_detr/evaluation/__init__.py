"""Metrics, predictions and comparisons."""
