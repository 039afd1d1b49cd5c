"""Pages and pictures: the report of an evaluation, overlays, plots."""
