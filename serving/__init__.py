"""Serves versions: one frozen base model, the right adapter for each request. Knows no training."""
