"""Speed and memory, ours against stock torch in one run. These are not tests: timings never decide
whether the tests pass."""
