"""python -m convert_weights FAMILY SOURCE OUT: see `cli`."""

from flowseg_jax.errors import run_cli

if __name__ == "__main__":
    run_cli("convert_weights.cli:main")
