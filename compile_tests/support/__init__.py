"""What the tests share: models, the oracle, and the check of a compiled call."""
