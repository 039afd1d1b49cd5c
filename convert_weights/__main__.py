"""python -m convert_weights FAMILY SOURCE OUT: see `cli`."""

from flowseg_jax.errors import run

if __name__ == "__main__":
    run("convert_weights.cli:main")
