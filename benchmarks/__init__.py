"""Benchmarks; each prints a table and writes JSON. See docs/measured.md for what their runs printed."""
