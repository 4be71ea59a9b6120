"""Parity with the public PyTorch code; README.md says what the arrays are and how the tests run."""
