"""Surrounds the training loop: the job, its steps, evaluations, checkpoints and records."""
