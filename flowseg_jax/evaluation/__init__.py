"""From predictions to numbers and pictures: protocols, integer metrics, exact masks on the device, the runner, the report."""
