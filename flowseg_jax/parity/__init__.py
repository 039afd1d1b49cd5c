"""Numeric parity with X-SAM's PyTorch code: `python -m flowseg_jax.parity DIR` compares every array of a recorded fixture."""
