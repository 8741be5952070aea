"""``python -m benchmarks.gpu``: all that there is to measure on a card, in one process."""
