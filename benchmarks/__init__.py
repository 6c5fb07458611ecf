"""Measurements, each a ratio within one run; results are committed under ``benchmarks/results``."""
