"""python -m convert_weights FAMILY SOURCE OUT: see `cli`."""

from convert_weights.cli import main
from flowseg_jax.errors import run

if __name__ == "__main__":
    run(main)
