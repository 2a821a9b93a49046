"""Checkpoints of other code bases, in and out."""

from .research import ResearchReport, load_research_checkpoint, research_state_dict, save_research_checkpoint

__all__ = ["ResearchReport", "load_research_checkpoint", "research_state_dict", "save_research_checkpoint"]
