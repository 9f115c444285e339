"""Profile bundles derived from the public kernel measurements of the PyPI package ``aiconfigurator-core``.

What each column of its tables counts is in :mod:`servesim.profiler.silicon.tables`.
"""

DERIVATION = 7
"""Revision of the formulas: raise it with every change of numbers, here, in ``grids`` and in ``shapes``.

Bundles made on demand are made again then; shipped ones are rebuilt by ``profiler/make_shipped.sh``.
"""
