"""What the predict.py command does around a `predict.Segmentor`: inputs, the choice among candidates, files, speed."""
