"""Trains: python train.py [--config=configs/shapes_tiny.py] [--workdir=runs/shapes_tiny] [--config.KEY=VALUE ...].

The same command resumes: it continues from the last checkpoint in the workdir and says so.
"""

from flowseg_jax.errors import run_cli

if __name__ == "__main__":
    run_cli("flowseg_jax.cli:train")
