"""The training loop and its parts: callbacks, checkpoints, schedules, losses, metrics, evaluation."""
