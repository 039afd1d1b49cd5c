"""Segments what a sentence names: python predict.py --image=FILE --text="the red circle" [--checkpoint=DIR | --workdir=DIR]."""

from flowseg_jax.errors import run_cli

if __name__ == "__main__":
    run_cli("flowseg_jax.cli:predict")
