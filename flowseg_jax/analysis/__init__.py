"""What a model gets wrong, and where: the commands of `python -m flowseg_jax.analysis`."""
