"""Self-contained HTML pages telling what a run or a comparison did."""
