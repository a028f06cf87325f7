"""A bundle on disk: its manifest, the checks before a session exists, its signature, its name on the hub."""
