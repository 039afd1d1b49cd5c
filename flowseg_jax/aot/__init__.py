"""What a run will need, before anyone pays for it: `flowseg plan`."""
