"""Speed and memory, ours against stock torch in one run. Nothing here is a test: timings never
decide whether the suite passes."""
