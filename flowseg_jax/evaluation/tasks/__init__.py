"""What is evaluated and how it is counted: one file a task, and the table of each from records alone."""
