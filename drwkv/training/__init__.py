"""What a training run owns beside model and data: optimizer, EMA, checkpoints, health, monitoring."""
