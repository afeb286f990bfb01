"""A pretrained sentence encoder as a function of its weights: `python -m demo`."""
