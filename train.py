"""Trains: the same as `flowseg train`. python train.py [--config=shapes_tiny] [--workdir=DIR] [--config.KEY=VALUE ...]."""

from flowseg_jax.errors import run_cli

if __name__ == "__main__":
    run_cli("flowseg_jax.cli.train:main")
