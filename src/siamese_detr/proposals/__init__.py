"""Class-agnostic boxes, and the store they live in."""

from siamese_detr.proposals.shard import StoredImage
from siamese_detr.proposals.store import ProposalStore

__all__ = ["ProposalStore", "StoredImage"]
