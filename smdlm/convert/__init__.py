"""Conversion of public PyTorch checkpoints to orbax and back."""
