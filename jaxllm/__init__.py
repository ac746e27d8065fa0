"""From raw text to an aligned, measured, exported language model, in JAX."""

__version__ = "0.1.0"
