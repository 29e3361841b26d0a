"""Token ids and an adapter in, token deltas out: the only place in `serving` that imports torch."""
