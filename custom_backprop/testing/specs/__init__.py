"""The specs, one file an op family; each with a list ``SPECS``."""
