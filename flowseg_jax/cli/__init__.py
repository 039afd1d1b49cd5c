"""The command line, `flowseg COMMAND`: flags become a config or arguments, and one call into the package.

`main` knows the commands, one module per command reads its flags. A module imports what it runs when it runs it, so `--help`
and a mistyped flag are answered at once, without JAX.
"""
