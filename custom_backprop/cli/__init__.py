"""The commands, one module each, with ``add_arguments(parser)`` and ``run(args) -> exit code``."""

#: each command, and what it does in one line
COMMANDS = {
    "check": "prove each op's backward against PyTorch autograd",
    "cost": "count what forward and backward of a model cost, layer by layer",
    "info": "print what this machine can run, and why it cannot run the rest",
    "kernels": "compile every kernel without a GPU, or audit its memory accesses",
    "validate": "prove the backward of any Function, operator, module or kernel",
}

#: the exit code after an interruption by the user, as in a shell
INTERRUPTED = 130
