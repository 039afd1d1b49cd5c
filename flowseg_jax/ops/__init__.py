"""Pure functions without parameters; nothing here knows about modules."""
