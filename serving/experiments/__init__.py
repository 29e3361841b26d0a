"""A/B tests between versions: who gets which arm, what came of it, and how sure that is."""
