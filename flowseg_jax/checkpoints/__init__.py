"""Models and runs on disk: model directories, checkpoints with checksums, manifests of parameters."""
