"""Checkpoints of PyTorch as model directories, and back: `flowseg convert FAMILY SOURCE OUT`.

One declarative table a family (`encoders`, `segmentor`, put together in `families`) pairs PyTorch's names with our
parameters; import and export read the same table. In Python: `convert.import_params`, `convert.export_params`.
"""
