"""Benchmarks: one question a file. `python -m perf` asks them all."""
