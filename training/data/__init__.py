"""Examples: read, checked, split by group, selected and generated."""
