"""The autograd Functions, one file an op family: what is saved, what is skipped, which formula
runs."""
