"""Mixed schemes: which part of a model minds being quantised, and the scheme chosen from that."""
