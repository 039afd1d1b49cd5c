"""FlowSeg in JAX and Flax: language-conditioned segmentation with bidirectional semantic flow.

`models/flowseg.py` is the whole network, `training/loop.py` a training run, `evaluation/benchmark.py` an evaluation.
"""
