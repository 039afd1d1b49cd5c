"""What runs around the mathematics: console, devices, processes, locks, JSON files, paths."""
