"""Class-agnostic boxes, and the store they live in."""

from siamese_detr.proposals.store import ProposalStore, StoredImage

__all__ = ["ProposalStore", "StoredImage"]
