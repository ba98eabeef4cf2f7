"""Skellam mixture mechanism: differentially private sums that survive secure aggregation.

After Bao, Zhu, Xiao, Yang, Ooi, Tan and Aung, PVLDB 15(11), 2022 (arXiv 2212.04371).
"""

from smm_dp.calibration import Parameters, calibrate, smallest_bits, wrap_probability
from smm_dp.mechanism import SkellamMixture, clip_mixture, second_moment, stochastic_round
from smm_dp.packing import centre, pack_bits, unpack_bits, wrap
from smm_dp.privacy import Accountant, AccountingWarning, RoundPrivacy, honest_mu
from smm_dp.randomness import secure_source, seeded_source
from smm_dp.rdp import Guarantee
from smm_dp.rotation import rotate, unrotate
from smm_dp.samplers import sample_skellam

__all__ = [
    "SkellamMixture",
    "calibrate",
    "Parameters",
    "RoundPrivacy",
    "Accountant",
    "Guarantee",
    "AccountingWarning",
    "honest_mu",
    "second_moment",
    "clip_mixture",
    "stochastic_round",
    "sample_skellam",
    "rotate",
    "unrotate",
    "wrap",
    "centre",
    "pack_bits",
    "unpack_bits",
    "wrap_probability",
    "smallest_bits",
    "secure_source",
    "seeded_source",
]
