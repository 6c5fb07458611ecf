"""The step, the loop around it, and what they need: sources, optimizer, checkpoints, metrics, evaluation."""
