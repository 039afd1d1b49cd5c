"""What a model gets wrong, and where: the commands of `flowseg analyze`."""
