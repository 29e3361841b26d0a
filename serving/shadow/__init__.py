"""A candidate beside production: on live traffic, where it answers nobody, or on logged prompts."""
