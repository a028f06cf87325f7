"""Generated retrieval tasks (passkey, S-NIAH, BABILong-style) and how their answers are scored."""
