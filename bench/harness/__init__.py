"""What all benchmarks share: cases that take turns, the load, the processes, the report."""
