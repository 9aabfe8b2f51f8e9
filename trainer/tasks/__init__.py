"""Tasks: a model and its loss, by name or a user's own."""

from trainer.tasks.models import FedAvgCNN, build_model, check_model, loss_function, parameter_count

__all__ = ["FedAvgCNN", "build_model", "check_model", "loss_function", "parameter_count"]
