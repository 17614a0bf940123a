"""Accuracy against speed on real images: what compression costs, and what else the same time buys."""
