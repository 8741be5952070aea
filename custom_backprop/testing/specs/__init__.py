"""The specs, one file an op family; each holds a list ``SPECS``."""
