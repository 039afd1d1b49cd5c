"""One file an on-disk format; every reader yields `flowseg_jax.data.records.Example`."""
