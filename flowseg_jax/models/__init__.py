"""What the network is: one file a component, `flowseg.py` for the whole."""
