"""The synchronizer: local steps, averagings, and `LocalSGD`, which is their front door."""

from trainer.sync.local_sgd import LocalSGD

__all__ = ["LocalSGD"]
