"""Class-agnostic boxes, and the store they live in."""
