import numpy as np
import pytest

from smm_dp import RoundPrivacy
from smm_dp.accountants import dp_event, noise_multiplier, opacus_accountant, rdp_accountant

MU = 240 * 5.95


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # opacus 1.6 imports what torch has renamed
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_opacus_accountant_gives_the_official_value_and_keeps_its_state():
    pytest.importorskip("opacus")
    from opacus.accountants import create_accountant

    opacus_accountant(4096.0, 4)
    accountant = create_accountant("skellam-mixture")
    multiplier = noise_multiplier(MU, 4096.0)
    for _ in range(1000):
        accountant.step(noise_multiplier=multiplier, sample_rate=0.004)
    assert len(accountant) == 1000
    assert round(accountant.get_epsilon(delta=1e-5), 6) == 2.998798
    again = create_accountant("skellam-mixture")
    again.load_state_dict(accountant.state_dict())
    again.step(noise_multiplier=multiplier, sample_rate=0.004)
    assert len(again) == 1001
    assert again.get_epsilon(1e-5) > accountant.get_epsilon(1e-5)


def test_dp_accounting_event_composes_with_gaussian_noise():
    dp_accounting = pytest.importorskip("dp_accounting")
    kind = RoundPrivacy(4096.0, MU, 4, sampling_rate=0.004)
    accountant = rdp_accountant()
    accountant.compose(dp_event(kind), 1000)
    assert round(accountant.get_epsilon(1e-5), 6) == 2.998798
    gaussian = dp_accounting.rdp.RdpAccountant(list(range(2, 129)))
    gaussian.compose(dp_accounting.GaussianDpEvent(5.0))
    accountant.compose(dp_accounting.GaussianDpEvent(5.0))
    finite = np.isfinite(accountant.rdp)
    np.testing.assert_allclose(accountant.rdp[finite], (1000 * kind.rdp(128) + gaussian.rdp)[finite])
    for adjacency, refused in (("replace-one", "zero-out"), ("zero-out", "add-remove")):
        other = RoundPrivacy(4096.0, MU, 4, adjacency=adjacency)
        with pytest.raises(dp_accounting.UnsupportedEventError, match=f"is for {refused} adjacency"):
            rdp_accountant(adjacency=refused).compose(dp_event(other))
        own = rdp_accountant(8, adjacency)
        own.compose(dp_event(other))
        np.testing.assert_array_equal(own.rdp, other.rdp(8))
    nested = rdp_accountant()
    nested.compose(dp_accounting.SelfComposedDpEvent(dp_event(kind), 1000))
    assert nested.get_epsilon(1e-5) == pytest.approx(2.998798, abs=1e-6)
