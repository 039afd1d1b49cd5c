"""Evaluates: the same as `flowseg eval`. python eval.py [--checkpoint=DIR | --workdir=DIR] [--split=val,testA,testB]."""

from flowseg_jax.errors import run_cli

if __name__ == "__main__":
    run_cli("flowseg_jax.cli.eval:main")
