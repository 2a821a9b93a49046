"""Self-contained HTML pages about a run or a comparison."""
