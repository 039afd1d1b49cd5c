"""What a run will need, before anyone pays for it: `train.py --plan`."""
