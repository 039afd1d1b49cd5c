"""What the tests share: small models and data, stand-ins, judges of their own."""
