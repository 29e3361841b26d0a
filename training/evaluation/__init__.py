"""How good a model is on held-out examples, and how sure that is."""
