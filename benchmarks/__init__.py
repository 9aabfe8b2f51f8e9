"""Measurements: each a command, with raw results in results/."""
