"""Turns a recipe into a version. Knows the registry's words, and no serving."""
