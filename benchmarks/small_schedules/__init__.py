"""The parts of `benchmarks/schedules_small.py`, a file each, and what they share."""
