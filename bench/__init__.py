"""Benchmarks: what the project claims, measured in one run beside what a user would otherwise have."""
