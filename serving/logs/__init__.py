"""The request log: what every request was, and of tenants that want it, what was said."""
