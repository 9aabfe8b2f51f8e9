"""Ranks and what they do together: the process group, its collectives, the clock, the thread beside training."""
