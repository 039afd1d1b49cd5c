"""Segments what a sentence names: the same as `flowseg predict`. python predict.py --image=FILE --text="the red circle"."""

from flowseg_jax.errors import run_cli

if __name__ == "__main__":
    run_cli("flowseg_jax.cli.predict:main")
