"""The autograd Functions, one file per family of ops: what is saved, what is skipped, which formula
runs."""
