"""`python -m flowseg_jax COMMAND`: the same as `flowseg COMMAND`."""

from flowseg_jax.errors import run_cli

if __name__ == "__main__":
    run_cli("flowseg_jax.cli.main:main")
