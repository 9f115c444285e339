"""Profile bundles computed from an accelerator's peak rates, for hardware that nobody measured."""

DERIVATION = 3
"""Revision of the formulas: raise it with every change of numbers, here, in ``grids`` and in ``shapes``."""
