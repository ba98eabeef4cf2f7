"""Flower's own simulation engine, with secure aggregation and clients that drop out."""

import warnings

import numpy as np
import pytest

flwr = pytest.importorskip("flwr")
pytestmark = [
    # flwr and ray warn of their own future, and leave processes and sockets to be collected
    pytest.mark.filterwarnings("ignore"),
]


def build_apps(tmp_path, dropped):
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.app import Message as FlowerMessage
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg

    from smm_dp import calibrate
    from smm_dp.flower import SkellamMixtureStrategy, smm_mod
    from smm_dp.ledger import PrivacyLedger

    client_app = ClientApp(mods=[smm_mod])

    @client_app.train()
    def train(msg, ctx):
        index = ctx.node_config["partition-id"]
        if index in dropped:
            raise RuntimeError("this client drops out")
        old = msg.content["arrays"]
        new = {name: Array(array.numpy() + 0.1 * (1 + index)) for name, array in old.items()}
        content = RecordDict({"arrays": ArrayRecord(new), "metrics": MetricRecord({"num-examples": 1})})
        return FlowerMessage(content=content, reply_to=msg)

    found = calibrate(
        200.0, 1e-5, 64.0**2, 64.0, 1.0, 2, "numeric", dim=7, participants=4, coordinate_bound=64.0
    )
    outcome = {}
    server_app = ServerApp()

    @server_app.main()
    def main(grid, ctx):
        ledger = PrivacyLedger(tmp_path / "ledger.json", 200.0, 1e-5, found.round_privacy)
        strategy = SkellamMixtureStrategy(FedAvg(), found, ledger, population=4, dropouts=0.26)
        start = ArrayRecord({"w": Array(np.zeros((2, 3), np.float32)), "b": Array(np.zeros(1, np.float32))})
        result = strategy.start(grid, start, num_rounds=2)
        outcome["arrays"] = [array.numpy() for array in result.arrays.values()]
        outcome["finished"] = strategy.finished
        outcome["rounds"] = ledger.rounds

    return server_app, client_app, outcome, found


def test_two_rounds_with_a_dropped_client_give_the_survivors_sum(tmp_path):
    pytest.importorskip("ray")
    from flwr.simulation import run_simulation

    server_app, client_app, outcome, found = build_apps(tmp_path, dropped={2})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one_worker = {"init_args": {"num_cpus": 1, "include_dashboard": False}}
        run_simulation(
            server_app, client_app, 4, backend_config=one_worker | {"client_resources": {"num_cpus": 1}}
        )
    assert outcome["rounds"] == 2
    assert [len(names) for names in outcome["finished"]] == [3, 3]
    steps = [0.1 * (1 + index) for index in range(4) if index != 2]
    clipped = [min(step, 1 / np.sqrt(7)) for step in steps]  # L2 norm 1 for 7 equal entries
    expected = 2 * sum(clipped) / 4
    flat = np.concatenate([array.ravel() for array in outcome["arrays"]])
    assert outcome["arrays"][0].shape == (2, 3)
    assert flat.dtype == np.float32
    np.testing.assert_allclose(flat, expected, atol=6 * found.noise_sd * 2 / 4)


def test_dropouts_and_amplification_exclude_each_other():
    from flwr.serverapp.strategy import FedAvg

    from shared_core import InputError
    from smm_dp import calibrate
    from smm_dp.flower import SkellamMixtureStrategy
    from smm_dp.ledger import PrivacyLedger

    for observer, refused in (("model-release", True), ("server", False)):
        found = calibrate(8.0, 1e-5, 256.0, 16.0, 0.5, 2, "numeric", dim=7, participants=6, observer=observer)
        ledger = PrivacyLedger(None, 8.0, 1e-5, found.round_privacy)
        arguments = {"population": 12, "sampling_rate": 0.5, "dropouts": 0.2}
        if refused:
            with pytest.raises(InputError, match="one constant total noise"):
                SkellamMixtureStrategy(FedAvg(), found, ledger, **arguments)
        else:
            SkellamMixtureStrategy(FedAvg(), found, ledger, **arguments)
        with pytest.raises(InputError, match="another kind of round"):
            SkellamMixtureStrategy(FedAvg(), found, ledger, population=12, sampling_rate=0.4)
