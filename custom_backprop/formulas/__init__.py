"""The mathematics, one file per family of ops, in plain differentiable torch, with its derivation.
No autograd, no Triton."""
