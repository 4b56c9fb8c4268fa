"""What happens between the steps of a run: metrics, health rules, checkpoints, validation images, signals."""
