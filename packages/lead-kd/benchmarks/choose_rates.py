"""Chooses the learning rates of the proof's methods on development queries; prints a table.

Run `python packages/lead-kd/benchmarks/choose_rates.py [METHOD ...]`. They stand in `lead_kd.experiments`.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from lead_kd.experiments import Sizes, choose_rates

if __name__ == "__main__":
    sizes = Sizes()
    if sys.argv[1:]:
        sizes = replace(sizes, arms=tuple(sys.argv[1:]))
    for name, values in choose_rates(sizes).items():
        best = max(values, key=values.__getitem__)
        print(name, {rate: round(value, 4) for rate, value in values.items()}, "best:", best, flush=True)
