"""Power and energy as integers, so that sums are exact and do not depend on their order.

Power is counted in nanowatts and time in nanoseconds; their product, and so every energy, is in attojoules
(1e-18 J). An energy per bit given in picojoules is a whole number of attojoules down to its sixth decimal.
Energies are Python integers: a megawatt over a day does not fit 64 bits.
"""

from __future__ import annotations

_NW = 1_000_000_000
"""Nanowatts in a watt."""
_AJ_PER_PJ = 1_000_000
AJ = 10**18
"""Attojoules in a joule."""
SECOND_NS = 1_000_000_000


def nanowatts(power_w: float) -> int:
    """A power in W as whole nanowatts."""
    return round(power_w * _NW)


def transfer_aj(moved_bytes: int, energy_per_bit_pj: float) -> int:
    """Energy of moving bytes: 8 bits each, ``energy_per_bit_pj`` pJ a bit."""
    return 8 * moved_bytes * round(energy_per_bit_pj * _AJ_PER_PJ)


def joules(energy_aj: int) -> float:
    """An energy in J, to the microjoule."""
    return round(energy_aj / AJ, 6)


def mean_watts(energy_aj: int, elapsed_ns: int) -> float:
    """The power that makes an energy over a time, in W to the milliwatt; 0 over no time."""
    return round(energy_aj / _NW / elapsed_ns, 3) if elapsed_ns > 0 else 0.0
