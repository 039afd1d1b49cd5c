"""Data: on-disk formats, preparation, prompts, pixels, batches. One way: formats -> pipeline -> `Batch`."""
