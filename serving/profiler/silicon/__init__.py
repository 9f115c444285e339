"""Profile bundles derived from the public kernel measurements of the PyPI package ``aiconfigurator-core``."""
