"""Profile bundles computed from an accelerator's peak rates, for hardware that nobody measured."""
