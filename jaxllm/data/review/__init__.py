"""Experts label a sample of what was kept and removed; their labels say how right the filters are."""
