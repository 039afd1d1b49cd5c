"""Numeric parity with X-SAM's PyTorch code: `flowseg parity DIR` compares a recorded fixture's arrays."""
