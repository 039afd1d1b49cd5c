"""What the network is: one file a tower, `flowseg.py` for the whole."""
