"""Prompts instead of training: which examples go before a question, measured and chosen."""
