"""Progress, metrics and the tree page."""
