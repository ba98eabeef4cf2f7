import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from shared_core import InputError
from smm_dp.packing import unpack_bits
from smm_dp.secure_aggregation import (
    AggregationAborted,
    AggregationPlan,
    Aggregator,
    Participant,
    aggregate_in_process,
)


def names(n):
    return tuple(f"client-{i}" for i in range(n))


def vectors_of(plan, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 2**plan.bits, plan.length, dtype=np.uint32) for name in plan.participants}


def plain_sum(plan, vectors, who):
    return [int(sum(int(vectors[name][i]) for name in who) % 2**plan.bits) for i in range(plan.length)]


@given(st.integers(3, 7), st.sampled_from([2, 8, 11, 16, 32]), st.integers(1, 40), st.data())
@settings(max_examples=15)
def test_the_sum_is_that_of_those_who_finish_whoever_drops_out(n, bits, length, data):
    threshold = (n - 1) // 2 + 1
    plan = AggregationPlan(names(n), length, bits, threshold)
    spare = n - threshold - 1
    gone = data.draw(st.lists(st.sampled_from(names(n)), max_size=spare, unique=True))
    before = frozenset(gone[: len(gone) // 2])
    after = frozenset(gone[len(gone) // 2 :])
    vectors = vectors_of(plan)
    total, finished = aggregate_in_process(
        plan, vectors, drop_before_masking=before, drop_after_masking=after
    )
    assert set(finished) == set(names(n)) - before
    assert total.tolist() == plain_sum(plan, vectors, finished)


def test_a_sparse_graph_gives_the_same_sum():
    plan = AggregationPlan(names(12), 20, 9, threshold=4, degree=6)
    vectors = vectors_of(plan)
    total, finished = aggregate_in_process(
        plan, vectors, drop_before_masking=frozenset({"client-3"}), drop_after_masking=frozenset({"client-8"})
    )
    assert len(finished) == 11
    assert total.tolist() == plain_sum(plan, vectors, finished)
    for name in plan.participants:
        assert len(set(plan.neighbours(name))) == 6
        assert all(name in plan.neighbours(other) for other in plan.neighbours(name))


def test_the_server_never_sees_an_unmasked_vector():
    """Toy trap 9: every message is inspected; a single masked vector is uniform on Z_m whatever it hides."""
    plan = AggregationPlan(names(4), 5000, 4, 2)
    server = Aggregator(plan)
    people = {name: Participant(name, plan) for name in plan.participants}
    for person in people.values():
        server.receive_keys(person.keys())
    for name, person in people.items():
        server.receive_shares(name, person.shares(server.keys))
    secret = np.full(plan.length, 5, np.uint32)
    seen = {name: person.masked(secret, server.mail(name)) for name, person in people.items()}
    for packed in seen.values():
        residues = unpack_bits(np.frombuffer(packed, np.uint8), plan.length, plan.bits)
        assert chisquare(np.bincount(residues, minlength=16)).pvalue > 1e-6
    partial = sum(unpack_bits(np.frombuffer(seen[n], np.uint8), 5000, 4).astype(int) for n in names(3)) % 16
    assert chisquare(np.bincount(partial, minlength=16)).pvalue > 1e-6
    for name, packed in seen.items():
        server.receive_masked(name, packed)
    assert chisquare(np.bincount(server._total & 15, minlength=16)).pvalue > 1e-6  # before unmasking
    for person in people.values():
        server.receive_unmasking(person.unmasking(frozenset(server.finished)))
    assert (server.result() == 4 * 5 % 16).all()


def test_plain_text_of_shares_is_not_in_the_mail():
    plan = AggregationPlan(names(3), 4, 8, 2)
    people = {name: Participant(name, plan) for name in plan.participants}
    keys = {name: person.keys() for name, person in people.items()}
    mail = people["client-0"].shares(keys)["client-1"]
    assert people["client-0"]._self_mask not in mail
    people["client-1"].shares(keys)
    altered = mail[:-1] + bytes([mail[-1] ^ 1])
    with pytest.raises(InputError, match="altered"):
        people["client-1"].masked(np.zeros(4, np.uint32), {"client-0": altered})


def test_below_the_threshold_nothing_is_revealed():
    plan = AggregationPlan(names(5), 4, 8, 3)
    with pytest.raises(AggregationAborted, match="finished"):
        aggregate_in_process(plan, vectors_of(plan), drop_before_masking=frozenset(names(3)))
    with pytest.raises(AggregationAborted, match="too few"):
        aggregate_in_process(plan, vectors_of(plan), drop_after_masking=frozenset(names(3)))


def test_fewer_survivors_than_the_accounting_assumes_abort():
    plan = AggregationPlan(names(6), 4, 8, 3, least=5)
    with pytest.raises(AggregationAborted, match="only 4 participants finished"):
        aggregate_in_process(plan, vectors_of(plan), drop_before_masking=frozenset(names(2)))


def test_two_shares_or_two_vectors_are_never_given():
    plan = AggregationPlan(names(3), 4, 8, 2)
    server = Aggregator(plan)
    people = {name: Participant(name, plan) for name in plan.participants}
    for person in people.values():
        server.receive_keys(person.keys())
    for name, person in people.items():
        server.receive_shares(name, person.shares(server.keys))
    one = people["client-0"]
    packed = one.masked(np.zeros(4, np.uint32), server.mail("client-0"))
    with pytest.raises(InputError, match="second vector"):
        one.masked(np.ones(4, np.uint32), server.mail("client-0"))
    server.receive_masked("client-0", packed)
    with pytest.raises(InputError, match="second message"):
        server.receive_masked("client-0", packed)
    with pytest.raises(InputError, match="second message"):
        server.receive_keys(one.keys())
    answer = one.unmasking(frozenset(names(3)))
    assert not set(answer.self_masks) & set(answer.mask_keys)
    with pytest.raises(InputError, match="revealed once"):
        one.unmasking(frozenset({"client-0", "client-1"}))


def test_messages_of_strangers_and_of_wrong_length_are_refused():
    plan = AggregationPlan(names(3), 4, 8, 2)
    server = Aggregator(plan)
    with pytest.raises(InputError, match="not in this stage"):
        server.receive_masked("client-0", bytes(4))
    with pytest.raises(InputError, match="not a participant"):
        Participant("stranger", plan)
    for name in plan.participants:
        server.receive_keys(Participant(name, plan).keys())
    server.sharers.update(plan.participants)
    with pytest.raises(InputError, match="client-1 sent 3 bytes, expected 4"):
        server.receive_masked("client-1", bytes(3))


def test_residues_of_wrong_range_or_length_never_leave_a_participant():
    plan = AggregationPlan(names(3), 4, 8, 2)
    person = Participant("client-2", plan)
    with pytest.raises(InputError, match="client-2 sent at index 3 a residue outside"):
        person.masked(np.array([0, 0, 0, 256], np.uint32), {})
    with pytest.raises(InputError, match="shape"):
        person.masked(np.zeros(5, np.uint32), {})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"participants": ("a", "b", "a")}, "occurs twice.*'a'"),
        ({"participants": ("a",)}, "fewer than 2"),
        ({"threshold": 1}, "threshold"),
        ({"threshold": 5}, "threshold"),
        ({"bits": 40}, "2 to 32"),
        ({"length": 0}, "length"),
        ({"degree": 3}, "even number"),
        ({"least": 1}, "least"),
    ],
)
def test_impossible_plans_are_refused(change, text):
    with pytest.raises(InputError, match=text):
        AggregationPlan(**({"participants": names(4), "length": 4, "bits": 8, "threshold": 2} | change))


def test_end_to_end_with_the_mechanism_and_a_dropout(rng):
    """Encode, aggregate securely with one dropout, decode: the sum of the survivors plus their noise."""
    from smm_dp import SkellamMixture

    n, dim = 5, 300
    mechanism = SkellamMixture(dim, 1e5, 256.0, 16, 50.0, n, 300, rotation_seed=4)
    x = {name: rng.standard_normal(dim) / np.sqrt(dim) for name in names(n)}
    plan = AggregationPlan(names(n), mechanism.padded_dim, 16, 3)
    residues = {name: mechanism.encode(vector, participant=name) for name, vector in x.items()}
    total, finished = aggregate_in_process(plan, residues, drop_before_masking=frozenset({"client-2"}))
    error = mechanism.decode(total) - sum(x[name] for name in finished)
    assert error.std() * 256 == pytest.approx(np.sqrt(2 * 50 * 4 / 5 + 4 * 0.2), rel=0.15)
