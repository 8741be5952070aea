"""The mathematics: one file an op family, in plain differentiable torch, with its derivation. No
autograd, no Triton."""
