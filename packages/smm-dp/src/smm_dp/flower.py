"""Flower: a client mod and a strategy wrapper that put the mechanism under real secure aggregation.

Flower carries the messages and runs the simulation; masks, shares and noise are this package's. Each round of
training takes four exchanges with the clients. The protected unit is one client: what is clipped is the
change of the model that a client's training makes.

    client_app = ClientApp(mods=[smm_mod])            # the client's own train function stays as it is
    strategy = SkellamMixtureStrategy(FedAvg(), parameters, ledger, population=1000, sampling_rate=0.1)
    strategy.start(grid, initial_arrays, num_rounds=...)
"""

import json
import logging
import random
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from shared_core import InputError
from smm_dp.calibration import Parameters
from smm_dp.ledger import PrivacyLedger
from smm_dp.mechanism import SkellamMixture
from smm_dp.randomness import IntegerReader, secure_source
from smm_dp.report import privacy_report
from smm_dp.secure_aggregation import (
    AggregationAborted,
    AggregationPlan,
    Aggregator,
    Participant,
    PublicKeys,
    Unmasking,
)

try:
    from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
    from flwr.serverapp.strategy import Strategy
except ModuleNotFoundError as _error:
    raise InputError(f"{_error.name} is not installed: pip install 'smm-dp[flower]'") from _error

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

_log = logging.getLogger(__name__)

_SMALLEST = 3  # with two, each could subtract its own vector from the sum

_RECORD = "smm-dp"  # name of our record in messages and in a client's state


def _pack(value: object) -> ConfigRecord:
    return ConfigRecord({"json": json.dumps(value)})


def _unpack(records: RecordDict, name: str = _RECORD) -> Any:
    return json.loads(str(records[name]["json"]))  # pyright: ignore[reportArgumentType, reportIndexIssue] a ConfigRecord of ours


def _plan(data: dict[str, Any]) -> AggregationPlan:
    fields: dict[str, Any] = {**data, "participants": tuple(data["participants"])}
    return AggregationPlan(**fields)


def flatten(arrays: ArrayRecord) -> np.ndarray:
    """Return all arrays of a record in one float64 vector, in the record's order."""
    return np.concatenate([array.numpy().astype(np.float64).ravel() for array in arrays.values()])


def unflatten(vector: np.ndarray, like: ArrayRecord) -> ArrayRecord:
    """Return a record with the names, shapes and dtypes of `like` and the numbers of `vector`."""
    from flwr.app import Array

    out, start = {}, 0
    for name, array in like.items():
        old = array.numpy()
        out[name] = Array(vector[start : start + old.size].reshape(old.shape).astype(old.dtype))
        start += old.size
    return ArrayRecord(out)


def smm_mod(msg: Message, ctx: "Context", call_next: Callable[[Message, "Context"], Message]) -> Message:
    """Flower client mod: answers the four stages, and trains through `call_next` in the third.

    The train function receives arrays and config as ever and returns the new arrays; only the masked, noisy,
    clipped change leaves the client. Its metrics are dropped: they would bypass the mechanism. A client whose
    training fails or gives no finite change sends noise around zero, as if it had not changed the model: that
    it failed is private too, and its own log says why. Messages of other types, such as evaluation, pass.

    Raises:
        InputError: The server asks for training without secure aggregation: nothing is trained or sent.
    """
    if _RECORD not in msg.content:
        if msg.metadata.message_type.split(".")[0] != MessageType.TRAIN:
            return call_next(msg, ctx)
        raise InputError(
            "the server asks for training without the record of SkellamMixtureStrategy: the reply would be "
            "the model in the clear: use that strategy, or take smm_mod out",
            field="message",
        )
    order = _unpack(msg.content)
    plan, name, stage = _plan(order["plan"]), order["name"], order["stage"]
    if stage == "keys":
        person = Participant(name, plan)
        keys = person.keys()
        answer: dict = {part: getattr(keys, part).hex() for part in ("encryption", "masking", "commitment")}
    else:
        person = Participant.from_state(_unpack(ctx.state), plan)
        if stage == "shares":
            keys_of = {
                n: PublicKeys(n, bytes.fromhex(e), bytes.fromhex(m)) for n, (e, m) in order["keys"].items()
            }
            answer = {n: share.hex() for n, share in person.shares(keys_of).items()}
        elif stage == "masked":
            try:
                residues = _train_and_encode(msg, ctx, call_next, order, name)
            except Exception:
                # Whether it worked depends on private data: to drop out here would be a release of its own.
                _log.exception("client %s sends noise around zero in round %s", name, plan.round_id)
                residues = _encode_zero(order, name)
            shares = {n: bytes.fromhex(share) for n, share in order["shares"].items()}
            answer = {"packed": person.masked(residues, shares).hex()}
        elif stage == "unmasking":
            reply = person.unmasking(frozenset(order["finished"]))
            answer = {
                kind: {n: (index, share.hex()) for n, (index, share) in getattr(reply, kind).items()}
                for kind in ("self_masks", "mask_keys")
            }
        else:
            raise InputError("unknown stage of secure aggregation", field="stage", value=stage)
    ctx.state[_RECORD] = _pack({} if stage == "unmasking" else person.state())
    return Message(content=RecordDict({_RECORD: _pack(answer)}), reply_to=msg)


def _octets(answer: dict[str, str]) -> dict[str, bytes]:
    return {name: bytes.fromhex(text) for name, text in answer.items()}


def _public_keys(name: str, answer: dict[str, str]) -> PublicKeys:
    parts = {part: bytes.fromhex(answer[part]) for part in ("encryption", "masking", "commitment")}
    return PublicKeys(name, **parts)


def _unmasking(name: str, answer: dict[str, Any]) -> Unmasking:
    parts = {
        kind: {n: (index, bytes.fromhex(share)) for n, (index, share) in answer[kind].items()}
        for kind in ("self_masks", "mask_keys")
    }
    return Unmasking(name, **parts)


def _train_and_encode(
    msg: Message, ctx: "Context", call_next: Callable[[Message, "Context"], Message], order: dict, name: str
) -> np.ndarray:
    if order["noise_only"]:
        return _encode_zero(order, name)
    before = flatten(next(iter(msg.content.array_records.values())))
    reply = call_next(msg, ctx)
    if reply.has_error():
        raise RuntimeError(f"training failed: {reply.error.reason}")
    after = flatten(next(iter(reply.content.array_records.values())))
    return _mechanism(order).encode(after - before, participant=f"client {name}")


def _encode_zero(order: dict, name: str) -> np.ndarray:
    mechanism = _mechanism(order)
    return mechanism.encode(np.zeros(mechanism.dim), participant=f"client {name}")


def _mechanism(order: dict) -> SkellamMixture:
    mechanism = SkellamMixture(**order["mechanism"])
    if not mechanism.mu_total > 0:
        raise InputError("the server asks for an encoding without noise", field="mu_total", value=0)
    return mechanism


class SkellamMixtureStrategy(Strategy):
    """Wraps a Flower strategy: the wrapped one sees a single reply, the private mean of the clients' changes.

    Clients are drawn by Poisson sampling (each by its own coin), whatever the wrapped strategy would draw.
    Every round makes a release and is charged, also where the coins draw fewer than three clients: others
    then send noise around a zero vector. (Leaving such rounds out would show who was drawn, and the rounds
    that are made would sample at more than the rate that is accounted.) The total noise is divided among so
    many as must finish, so it does not depend on how many were drawn.

    A client whose reply is malformed counts as dropped out. Whether a client drops out must not depend on its
    data: that is why `smm_mod` sends noise around zero where training fails. A round in which too few finish
    changes nothing and stays charged.

    Args:
        inner: Strategy that applies the mean, e.g. FedAvg, FedAdam, FedAvgM.
        parameters: From `smm_dp.calibrate`, for the sampling rate and number of rounds to come.
        ledger: Charged before each round's messages go out; raises `BudgetExceeded` at the end of the budget.
        population: N, number of clients that the guarantee is for; sums are divided by the constant qN.
        sampling_rate: q; must be the ledger's.
        dropouts: Share of drawn clients who may vanish in a round; the others' noise then suffices. Only
            where accounting uses no amplification by sampling (rate 1, or observer="server").
        colluders: Clients of a round who may tell the observer their noise; the noise of the others who must
            finish then suffices. Only where accounting uses no amplification, as for dropouts.
        timeout: Seconds to wait for each stage.
        patience: Seconds to wait at most, before a round, for `population` clients to be connected.

    Raises:
        InputError: The ledger was made for another kind of round, for add-remove adjacency, or dropouts meet
            amplification.
    """

    def __init__(
        self,
        inner: Strategy,
        parameters: Parameters,
        ledger: PrivacyLedger,
        *,
        population: int,
        sampling_rate: float = 1.0,
        dropouts: float = 0.0,
        colluders: int = 0,
        timeout: float = 600.0,
        patience: float = 30.0,
    ) -> None:
        if (
            ledger.round_privacy != parameters.round_privacy
            or sampling_rate != ledger.round_privacy.sampling_rate
        ):
            raise InputError("the ledger was made for another kind of round", field="ledger")
        if parameters.mu_total != ledger.round_privacy.mu:
            raise InputError(
                f"the ledger's rounds state noise of mu {ledger.round_privacy.mu:g}",
                field="mu_total",
                value=parameters.mu_total,
            )
        if ledger.round_privacy.adjacency == "add-remove":
            raise InputError(
                "a client's absence shows in which rounds are given up and in how much noise there is: "
                "calibrate with adjacency='zero-out'",
                field="adjacency",
            )
        if not 0 <= dropouts < 0.5:
            raise InputError("a share in 0..0.5", field="dropouts", value=dropouts)
        if dropouts > 0 and ledger.round_privacy.effective_rate < 1:
            raise InputError(
                "amplification by sampling is proved for one constant total noise; with dropouts it varies. "
                "Use dropouts=0 (a dropout then gives up the round), or account with observer='server'",
                field="dropouts",
                value=dropouts,
            )
        if colluders < 0 or (colluders > 0 and ledger.round_privacy.effective_rate < 1):
            raise InputError(
                "expected at least 0; and 0 with amplification by sampling, which is proved for one constant "
                "total noise: account with observer='server'",
                field="colluders",
                value=colluders,
            )
        self.inner, self.parameters, self.ledger, self.colluders = inner, parameters, ledger, colluders
        self.population, self.sampling_rate, self.dropouts = population, sampling_rate, dropouts
        self.timeout, self.patience = timeout, patience
        self._server: Aggregator | None = None
        self.finished: list[tuple[str, ...]] = []
        """Names of the clients in each round's sum: known to the server, not for release."""

    def summary(self) -> None:
        """Log what is wrapped."""
        self.inner.summary()

    def privacy_report(self) -> dict[str, Any]:
        """Return the report of all releases in the ledger, for `smm_dp.report.write_report`.

        Raises:
            InputError: This strategy has made no release yet.
        """
        if not self.ledger.rounds or self._server is None:
            raise InputError("no round was made, so there is nothing to report", field="rounds", value=0)
        return privacy_report(
            self._mechanism,
            self.ledger.round_privacy,
            self.ledger.rounds,
            self.ledger.delta,
            sampler=secure_source().label,
            secure_source=True,
            aggregation="Z_m secure aggregation over Flower: the server sees masked vectors and their sum",
            notes=(
                f"Each of {self.population} clients takes part with chance {self.sampling_rate:g}. A round "
                f"may lose {self.dropouts:.0%} of those who do; {self.colluders} may tell their noise.",
                "The server learns of no client whether its change was clipped, nor which sums wrapped.",
            ),
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: "Grid"
    ) -> Iterable[Message]:
        """Charge the ledger, run the first three stages, and return the messages of the fourth."""
        self._arrays = arrays
        self._server = None
        nodes = self._connected(grid)
        if len(nodes) < _SMALLEST:
            warnings.warn(
                f"round {server_round}: only {len(nodes)} clients are connected, {_SMALLEST} are needed",
                stacklevel=2,
            )
            return []
        sampled, drawn = self._draw(nodes)
        least = max(2, len(drawn) - int(self.dropouts * len(drawn)))
        if least <= self.colluders:
            raise InputError(
                f"only {least} clients are sure to finish: no noise is left that colluders do not know",
                field="colluders",
                value=self.colluders,
            )
        self.ledger.charge()
        self._start(server_round, drawn, least)
        server = self._aggregator
        answers = self._exchange(grid, "keys", drawn, lambda name: {})
        self._take("keys", answers, lambda name, answer: server.receive_keys(_public_keys(name, answer)))
        public = {name: (key.encryption.hex(), key.masking.hex()) for name, key in server.keys.items()}
        answers = self._exchange(grid, "shares", self._ids(public), lambda name: {"keys": public})
        self._take("shares", answers, lambda name, answer: server.receive_shares(name, _octets(answer)))
        answers = self._exchange(
            grid,
            "masked",
            self._ids(server.sharers),
            lambda name: {
                "shares": {n: s.hex() for n, s in server.mail(name).items()},
                "mechanism": asdict(self._mechanism),
                "noise_only": int(name) not in sampled,
            },
            {"arrays": arrays, "config": config},
        )
        self._take(
            "masked",
            answers,
            lambda name, answer: server.receive_masked(name, bytes.fromhex(answer["packed"])),
        )
        finished = sorted(self._aggregator.finished)
        return self._messages("unmasking", self._ids(finished), lambda name: {"finished": finished})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Unmask the sum, decode the mean, and let the wrapped strategy apply it.

        Where too few clients finished, a warning says so and nothing is returned: the model stays as it was.
        """
        if self._server is None:
            return None, None
        sources = [message for message in replies if not message.has_error()]
        answers = {str(message.metadata.src_node_id): message.content for message in sources}
        receive = self._aggregator.receive_unmasking
        self._take("unmasking", answers, lambda name, answer: receive(_unmasking(name, answer)))
        try:
            total = self._aggregator.result()
        except AggregationAborted as error:
            warnings.warn(f"round {server_round} is given up, its budget stays spent: {error}", stacklevel=2)
            return None, None
        self.finished.append(tuple(sorted(self._aggregator.finished)))
        change = self._mechanism.decode(total, count=self.sampling_rate * self.population)
        content = RecordDict(
            {
                "arrays": unflatten(flatten(self._arrays) + change, self._arrays),
                "metrics": MetricRecord({"num-examples": 1.0}),
            }
        )
        template = sources[0]
        template.content = content
        return self.inner.aggregate_train(server_round, [template])

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: "Grid"
    ) -> Iterable[Message]:
        """Ask nobody: clients' metrics are private. Evaluate on the server, `start(evaluate_fn=...)`."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing: see `configure_evaluate`."""
        return None

    def _connected(self, grid: "Grid") -> list[int]:
        end = time.monotonic() + self.patience
        while len(nodes := sorted(grid.get_node_ids())) < self.population and time.monotonic() < end:
            time.sleep(0.5)
        return nodes

    def _draw(self, nodes: list[int]) -> tuple[list[int], list[int]]:
        """Return those of whom each one's own coin says so, and with them so many others as a round needs."""
        coins = IntegerReader(secure_source())
        sampled = [node for node in nodes if coins.below(1 << 53) < self.sampling_rate * (1 << 53)]
        others = [node for node in nodes if node not in sampled]
        spare = random.SystemRandom().sample(others, max(0, _SMALLEST - len(sampled)))
        return sampled, sorted([*sampled, *spare])

    @staticmethod
    def _take(stage: str, answers: dict[str, RecordDict], receive: Callable[[str, Any], None]) -> None:
        """Hand the server each answer; one that it cannot read counts as none."""
        for name, answer in answers.items():
            try:
                receive(name, _unpack(answer))
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                warnings.warn(
                    f"client {name} counts as dropped out, its answer to {stage!r} is malformed: {error}",
                    stacklevel=3,
                )

    def _start(self, server_round: int, drawn: list[int], least: int) -> None:
        found = self.parameters
        dim = sum(array.numpy().size for array in self._arrays.values())
        self._mechanism = SkellamMixture(
            dim,
            found.round_privacy.clip,
            found.scale,
            found.modulus_bits,
            found.mu_total,
            least - self.colluders,
            found.coordinate_bound,
            found.round_privacy.accounting,
            rotation_seed=IntegerReader(secure_source()).below(2**31),
        )
        names = tuple(str(node) for node in drawn)
        threshold = (len(names) - 1) // 2 + 1
        plan = AggregationPlan(
            names, self._mechanism.padded_dim, found.modulus_bits, threshold, f"{server_round}", None, least
        )
        self._server = Aggregator(plan)

    @property
    def _aggregator(self) -> Aggregator:
        assert self._server is not None
        return self._server

    @staticmethod
    def _ids(names: Iterable[str]) -> list[int]:
        return [int(name) for name in names]

    def _messages(
        self, stage: str, nodes: Iterable[int], order: Callable[[str], dict], records: dict | None = None
    ) -> list[Message]:
        plan = asdict(self._aggregator.plan)
        return [
            Message(
                content=RecordDict(
                    {
                        **(records or {}),
                        _RECORD: _pack({"stage": stage, "plan": plan, "name": str(node)} | order(str(node))),
                    }
                ),
                dst_node_id=node,
                message_type=MessageType.TRAIN,
            )
            for node in nodes
        ]

    def _exchange(
        self,
        grid: "Grid",
        stage: str,
        nodes: list[int],
        order: Callable[[str], dict],
        records: dict | None = None,
    ) -> dict[str, RecordDict]:
        """Send a stage to clients; return the answers of those who gave one, the others dropped out."""
        replies = grid.send_and_receive(self._messages(stage, nodes, order, records), timeout=self.timeout)
        return {str(r.metadata.src_node_id): r.content for r in replies if not r.has_error()}
