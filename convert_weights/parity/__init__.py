"""Numeric parity with X-SAM's PyTorch code: `python -m convert_weights.parity DIR` compares a recorded fixture's arrays."""
