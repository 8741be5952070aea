"""The specs, one file per family of ops, each with a list ``SPECS``."""
