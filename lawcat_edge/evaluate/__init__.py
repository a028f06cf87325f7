"""Evaluation: retrieval tasks built on the spot, and perplexity and KL by position, on teacher, student and
bundle."""
