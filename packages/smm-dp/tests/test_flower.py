"""Flower's own simulation engine, with secure aggregation and clients that drop out."""

import json
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

    def vanish(msg, ctx, call_next):
        if ctx.node_config["partition-id"] in dropped and '"masked"' in str(msg.content["smm-dp"]["json"]):
            raise RuntimeError("this client drops out")
        return call_next(msg, ctx)

    client_app = ClientApp(mods=[vanish, smm_mod])

    @client_app.train()
    def train(msg, ctx):
        index = ctx.node_config["partition-id"]
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
        # a cluster of its own: without the address Ray joins whatever cluster runs on the machine
        one_worker = {"init_args": {"num_cpus": 1, "include_dashboard": False, "address": "local"}}
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


def test_absent_clients_have_no_guarantee_and_the_noise_is_the_ledgers():
    from dataclasses import replace

    from flwr.serverapp.strategy import FedAvg

    from shared_core import InputError
    from smm_dp import calibrate
    from smm_dp.flower import SkellamMixtureStrategy
    from smm_dp.ledger import PrivacyLedger

    for adjacency in ("add-remove", "zero-out"):
        found = calibrate(
            8.0, 1e-5, 256.0, 16.0, 1.0, 2, "numeric", dim=7, participants=6, adjacency=adjacency
        )
        ledger = PrivacyLedger(None, 8.0, 1e-5, found.round_privacy)
        if adjacency == "add-remove":
            with pytest.raises(InputError, match="adjacency: a client's absence shows"):
                SkellamMixtureStrategy(FedAvg(), found, ledger, population=6)
        less = replace(found, mu_total=found.mu_total / 2)
        with pytest.raises(InputError, match="mu_total: the ledger's rounds state noise of mu"):
            SkellamMixtureStrategy(FedAvg(), less, ledger, population=6)


class FakeGrid:
    """Clients in this process: messages go through `smm_mod`, an exception becomes an error reply."""

    def __init__(self, clients, change=0.1, spoil=None):
        from types import SimpleNamespace

        from flwr.app import RecordDict

        self.contexts = {node: SimpleNamespace(state=RecordDict()) for node in range(1, clients + 1)}
        self.change, self.spoil = change, spoil
        self.trained, self.errors = [], []

    def get_node_ids(self):
        return list(self.contexts)

    def train(self, message, context):
        from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

        node = message.metadata.dst_node_id
        self.trained.append(node)
        change = self.change(node) if callable(self.change) else self.change
        new = {name: Array(a.numpy() + np.float32(change)) for name, a in message.content["arrays"].items()}
        content = RecordDict({"arrays": ArrayRecord(new), "metrics": MetricRecord({"num-examples": 1})})
        return flwr.app.Message(content=content, reply_to=message)

    def send_and_receive(self, messages, timeout=None):
        return [self.reply(message) for message in messages]

    def reply(self, message):
        from flwr.app import ConfigRecord, Error

        from smm_dp.flower import smm_mod

        node = message.metadata.dst_node_id
        message.metadata.__dict__["_message_id"] = f"{node}"
        stage = json.loads(message.content["smm-dp"]["json"])["stage"]
        try:
            answer = smm_mod(message, self.contexts[node], self.train)
        except Exception as error:
            self.errors.append((node, str(error)))
            answer = flwr.app.Message(Error(code=2, reason=str(error)), reply_to=message)
        else:
            if self.spoil and node == 2:
                data = self.spoil(stage, json.loads(answer.content["smm-dp"]["json"]))
                answer.content["smm-dp"] = ConfigRecord({"json": json.dumps(data)})
        answer.metadata.__dict__["_src_node_id"] = node
        return answer


@pytest.fixture
def task(monkeypatch):
    """What Flower's engine sets in a process of its own; messages cannot be made without it."""
    identity = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity
    for field, value in (("run_id", 1), ("node_id", 0), ("task_id", 1)):
        monkeypatch.setattr(identity, f"_{field}", value)


def strategy_of(rate, rounds, population, **arguments):
    from flwr.serverapp.strategy import FedAvg

    from smm_dp import calibrate
    from smm_dp.flower import SkellamMixtureStrategy
    from smm_dp.ledger import PrivacyLedger

    found = calibrate(
        50.0, 1e-5, 256.0, 16.0, rate, rounds, "numeric", dim=7, participants=max(1, int(rate * population)),
        observer=arguments.pop("observer", "model-release"),
    )  # fmt: skip
    ledger = PrivacyLedger(None, 50.0, 1e-5, found.round_privacy)
    return SkellamMixtureStrategy(
        FedAvg(), found, ledger, population=population, sampling_rate=rate, patience=0, **arguments
    )


def start():
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({"w": Array(np.zeros((2, 3), np.float32)), "b": Array(np.zeros(1, np.float32))})


def one_round(strategy, grid, number=1):
    from flwr.app import ConfigRecord

    messages = list(strategy.configure_train(number, start(), ConfigRecord(), grid))
    arrays, _ = strategy.aggregate_train(number, grid.send_and_receive(messages))
    return arrays


def test_every_round_is_charged_and_samples_at_the_accounted_rate(task):
    """Rounds that few are drawn for must not be left out: those made would sample at more than q."""
    strategy, grid = strategy_of(0.25, 60, 4), FakeGrid(4)
    for number in range(60):
        assert one_round(strategy, grid, number) is not None
    assert strategy.ledger.rounds == 60
    assert all(len(names) >= 3 for names in strategy.finished)
    assert 32 <= len(grid.trained) <= 90  # 240 coins of chance 1/4: 60 ± 4 standard deviations of 6.7


def test_training_without_the_record_is_refused_and_evaluation_passes(task):
    from flwr.app import ConfigRecord, Message, RecordDict

    from shared_core import InputError
    from smm_dp.flower import smm_mod

    def reply_in_the_clear(message, context):
        return message

    def message_of(kind):
        content = RecordDict({"arrays": start(), "config": ConfigRecord()})
        return Message(content=content, dst_node_id=1, message_type=kind)

    with pytest.raises(InputError, match="model in the clear"):
        smm_mod(message_of("train"), None, reply_in_the_clear)
    evaluation = message_of("evaluate")
    assert smm_mod(evaluation, None, reply_in_the_clear) is evaluation


@pytest.mark.parametrize("change", [float("nan"), 3.14159e17])
@pytest.mark.parametrize("rate", [1.0, 0.9])
def test_a_client_whose_training_fails_looks_like_one_that_changed_nothing(task, change, rate, caplog):
    """That it failed depends on private data: a client that dropped out then would tell."""
    strategy = strategy_of(rate, 2, 5)
    grid = FakeGrid(5, change=lambda node: change)
    arrays = one_round(strategy, grid)
    assert grid.errors == []
    assert "sends noise around zero" in caplog.text  # in the client's own log
    moved = np.concatenate([array.numpy().ravel() for array in arrays.values()])
    np.testing.assert_allclose(moved, 0, atol=6 * strategy.parameters.noise_sd * 2 / (5 * rate))


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("keys", lambda data: data | {"masking": "00" * 31}),
        ("keys", lambda data: []),
        ("shares", lambda data: data | {"999": "00"}),
        ("shares", lambda data: dict(list(data.items())[:2])),
        ("masked", lambda data: {"packed": data["packed"][:-2]}),
        ("masked", lambda data: {"packed": "zz"}),
        ("unmasking", lambda data: {"self_masks": {"3": [1, "00"]}, "mask_keys": {}}),
        ("unmasking", lambda data: {}),
    ],
)
def test_a_client_that_answers_nonsense_counts_as_dropped_out(task, stage, fault):
    strategy = strategy_of(1.0, 2, 6, dropouts=0.34, observer="server")
    grid = FakeGrid(6, spoil=lambda at, data: fault(data) if at == stage else data)
    with pytest.warns(UserWarning, match=f"client 2 counts as dropped out, its answer to '{stage}'"):
        arrays = one_round(strategy, grid)
    number = 6 if stage == "unmasking" else 5  # after masking, its vector is in the sum
    assert len(strategy.finished[0]) == number
    change = np.concatenate([array.numpy().ravel() for array in arrays.values()])
    noise = 6 * strategy.parameters.noise_sd * 2 / 6
    np.testing.assert_allclose(change, 0.1 * number / 6, atol=noise)


def test_a_round_without_enough_survivors_changes_nothing_and_stays_charged(task):
    strategy = strategy_of(0.9, 2, 6)  # amplified: nobody may drop out
    grid = FakeGrid(6, spoil=lambda stage, data: {} if stage == "masked" else data)
    strategy._draw = lambda nodes: (nodes, nodes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert one_round(strategy, grid) is None
    assert any("given up, its budget stays spent" in str(warning.message) for warning in caught)
    assert strategy.ledger.rounds == 1
    assert strategy.finished == []


def test_a_client_refuses_an_encoding_without_noise(task):
    from dataclasses import replace

    strategy = strategy_of(1.0, 2, 3)
    strategy.parameters = replace(strategy.parameters, mu_total=0.0)
    with pytest.warns(UserWarning, match="given up"):
        assert one_round(strategy, FakeGrid(3)) is None


def test_orders_state_the_noise_of_those_who_must_finish_and_a_fresh_rotation(task):
    """With dropouts allowed, the survivors' noise alone is what was accounted."""
    strategy = strategy_of(1.0, 3, 6, dropouts=0.34, observer="server")
    orders = []

    class Spy(FakeGrid):
        def reply(self, message):
            orders.append(json.loads(message.content["smm-dp"]["json"]))
            return super().reply(message)

    grid = Spy(6)
    for number in range(2):
        one_round(strategy, grid, number)
    assert {order["plan"]["least"] for order in orders} == {4}
    masked = [order["mechanism"] for order in orders if order["stage"] == "masked"]
    assert {each["participants"] for each in masked} == {4}
    assert {each["mu_total"] for each in masked} == {strategy.parameters.mu_total}
    assert len({each["rotation_seed"] for each in masked}) == 2


def test_sums_are_divided_by_the_expected_number_whoever_is_drawn(task):
    strategy, grid = strategy_of(0.5, 2, 8), FakeGrid(8)
    strategy._draw = lambda nodes: (nodes[:3], nodes[:3])
    moved = np.concatenate([array.numpy().ravel() for array in one_round(strategy, grid).values()])
    np.testing.assert_allclose(moved, 0.1 * 3 / (0.5 * 8), atol=6 * strategy.parameters.noise_sd / 4)


def test_equal_clients_send_different_noise(task, monkeypatch):
    from smm_dp.mechanism import SkellamMixture

    sent, encode = [], SkellamMixture.encode

    def spy(self, x, *rest, **named):
        sent.append(encode(self, x, *rest, **named))
        return sent[-1]

    monkeypatch.setattr(SkellamMixture, "encode", spy)
    one_round(strategy_of(1.0, 1, 3), FakeGrid(3))
    assert len({payload.tobytes() for payload in sent}) == 3


def test_the_report_of_a_run_states_the_ledger_and_what_may_be_lost(task, tmp_path):
    from shared_core import InputError
    from smm_dp.report import write_report

    strategy = strategy_of(1.0, 3, 6, dropouts=0.34, observer="server")
    with pytest.raises(InputError, match="no round was made"):
        strategy.privacy_report()
    one_round(strategy, FakeGrid(6))
    report = strategy.privacy_report()
    assert report["epsilon"] == strategy.ledger.spent().epsilon
    assert (report["rounds"], report["protects"]) == (1, True)
    assert any("server, which knows who takes part" in text for text in report["assumptions"])
    assert any("lose 34% of those" in text for text in report["notes"])
    page = write_report(report, tmp_path)[1].read_text()
    assert "masked vectors" in page


def test_colluders_noise_is_not_counted(task):
    from shared_core import InputError

    strategy, shares = strategy_of(1.0, 3, 6, colluders=2), []

    class Spy(FakeGrid):
        def reply(self, message):
            order = json.loads(message.content["smm-dp"]["json"])
            shares.append(order.get("mechanism", {}).get("participants"))
            return super().reply(message)

    one_round(strategy, Spy(6))
    assert set(shares) == {None, 4}  # four honest shares of mu/4 make up mu
    with pytest.raises(InputError, match="colluders"):
        one_round(strategy_of(1.0, 3, 6, colluders=6), FakeGrid(6))
    with pytest.raises(InputError, match="one constant total noise"):
        strategy_of(0.5, 3, 6, colluders=1)
