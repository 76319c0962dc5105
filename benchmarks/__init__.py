"""Measurements that take minutes and are read, not asserted: `python -m benchmarks.<name>`."""
