"""What a version is, and which version a name means. Knows neither torch nor HTTP."""
