"""The HTTP surface: the only place in `serving` that imports litestar."""
