from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from shared_core import InputError
from smm_dp.masks import combine_shares, split_secret, uniform_mask
from smm_dp.packing import unpack_bits
from smm_dp.secure_aggregation import (
    AggregationAborted,
    AggregationPlan,
    Aggregator,
    Participant,
    _mask,
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


def exchange(plan, people=None, absent=frozenset()):
    """Run an aggregation up to the masked vectors; return the server and the participants."""
    server = Aggregator(plan)
    people = people or {name: Participant(name, plan) for name in plan.participants}
    for person in people.values():
        server.receive_keys(person.keys())
    for name, person in people.items():
        server.receive_shares(name, person.shares(server.keys))
    for name, person in people.items():
        if name not in absent:
            server.receive_masked(name, person.masked(vectors_of(plan)[name], server.mail(name)))
    return server, people


@pytest.mark.parametrize("bits", [2, 8, 11, 16, 17, 32])
def test_every_bit_of_a_mask_is_a_fair_coin(bits):
    n = 4000
    mask = uniform_mask(b"seed", "test", n, bits)
    for place in range(32):
        ones = int((mask >> np.uint32(place) & np.uint32(1)).sum())
        assert ones == 0 if place >= bits else abs(ones - n / 2) < 6 * np.sqrt(n) / 2


def test_one_secret_gives_unrelated_masks_for_each_round_and_purpose():
    plan = AggregationPlan(names(3), 4096, 4, 2, round_id="7")
    masks = [
        _mask(b"s" * 32, replace(plan, round_id=round_id), purpose)
        for round_id in ("7", "8")
        for purpose in ("self", "pair")
    ]
    for one, other in combinations(masks, 2):
        difference = (one - other) & np.uint32(15)
        assert chisquare(np.bincount(difference, minlength=16)).pvalue > 1e-6


def test_only_the_neighbour_it_is_for_can_read_a_share_and_only_in_its_round():
    plan = AggregationPlan(names(3), 4, 8, 2, round_id="7")
    people = {name: Participant(name, plan) for name in plan.participants}
    keys = {name: person.keys() for name, person in people.items()}
    mail = {name: person.shares(keys) for name, person in people.items()}["client-0"]["client-1"]
    label = b"7|client-0|client-1"

    def read(person):
        plain = AESGCM(person._channel("client-0")).decrypt(mail[:12], mail[12:], label)
        return int.from_bytes(plain[:4], "big"), len(plain)

    assert read(people["client-1"]) == (1, 4 + 32 + 32)
    later = Participant.from_state(people["client-1"].state(), replace(plan, round_id="8"))
    for stranger in (people["client-2"], later):
        with pytest.raises(InvalidTag):
            read(stranger)


def test_fewer_shares_than_the_threshold_do_not_give_the_secret():
    secret = bytes(range(100, 132))
    for threshold, count in ((2, 3), (3, 5), (4, 4)):
        shares = list(enumerate(split_secret(secret, threshold, count), start=1))
        for some in combinations(shares, threshold):
            assert combine_shares(list(some)) == secret
        for few in combinations(shares, threshold - 1):
            value = combine_shares(list(few))
            assert value[:16] != secret[:16]
            assert value[16:] != secret[16:]


def test_the_server_gives_up_by_itself_where_too_few_finished():
    """Participants under a laxer plan would answer: the noise in the sum would be less than accounted for."""
    lax = AggregationPlan(names(6), 4, 8, 3, least=2)
    people = {name: Participant(name, lax) for name in lax.participants}
    server, _ = exchange(replace(lax, least=5), people, absent=frozenset(names(2)))
    for name in server.finished:
        server.receive_unmasking(people[name].unmasking(frozenset(server.finished)))
    with pytest.raises(AggregationAborted, match="only 4 of the 5 participants needed finished"):
        server.result()


@pytest.mark.parametrize("place", ["encryption", "masking"])
@pytest.mark.parametrize("size", [0, 31, 32, 33])  # 32 zeros are a point of low order
def test_what_is_no_key_is_refused_and_the_right_ones_still_taken(place, size):
    plan = AggregationPlan(names(3), 4, 8, 2)
    server, keys = Aggregator(plan), Participant("client-1", plan).keys()
    with pytest.raises(InputError, match="client-1 sent what is no X25519 key"):
        server.receive_keys(replace(keys, **{place: bytes(size)}))
    with pytest.raises(InputError, match="not in this stage"):
        server.receive_keys(replace(keys, sender="stranger"))
    server.receive_keys(keys)
    assert server.keys == {"client-1": keys}


def test_shares_are_for_all_neighbours_with_keys_and_nobody_else():
    plan = AggregationPlan(names(4), 4, 8, 2)
    server = Aggregator(plan)
    people = {name: Participant(name, plan) for name in names(3)}  # client-3 never came
    for person in people.values():
        server.receive_keys(person.keys())
    shares = people["client-0"].shares(server.keys)
    one = shares["client-1"]
    for wrong in (
        {"client-1": one},
        {},
        shares | {"client-3": one},
        shares | {"client-0": one},
        {"x": one, "y": one},
    ):
        with pytest.raises(InputError, match=r"client-0 sent shares for \d names, expected its 2 neighbours"):
            server.receive_shares("client-0", wrong)
    with pytest.raises(InputError, match="not in this stage"):
        server.receive_shares("client-3", shares)
    assert server.mail("client-1") == {}
    server.receive_shares("client-0", shares)
    assert server.mail("client-1") == {"client-0": one}
    with pytest.raises(InputError, match="second message"):
        server.receive_shares("client-0", shares)


def test_what_is_no_share_of_a_key_is_refused_and_the_right_answer_still_taken():
    plan = AggregationPlan(names(4), 4, 8, 2)
    server, people = exchange(plan, absent=frozenset({"client-3"}))
    finished = frozenset(server.finished)
    answers = {name: people[name].unmasking(finished) for name in sorted(finished)}
    good = answers["client-0"]
    index, share = good.self_masks["client-1"]
    for bad in ((index, share[:31]), (index, share + b"x"), (index, b""), (0, share), (-1, share)):
        for field in ("self_masks", "mask_keys"):
            with pytest.raises(InputError, match="client-0 sent what is no share of a key"):
                server.receive_unmasking(replace(good, **{field: {"client-1": bad}}))
    with pytest.raises(InputError, match="not in this stage"):
        server.receive_unmasking(replace(good, sender="client-3"))
    for answer in answers.values():
        server.receive_unmasking(answer)
    with pytest.raises(InputError, match="second message"):
        server.receive_unmasking(good)
    assert server.result().tolist() == plain_sum(plan, vectors_of(plan), finished)


def test_a_mask_key_that_its_shares_do_not_give_aborts_the_round():
    """A false share of a dropped participant's key would leave its masks in the sum."""
    plan = AggregationPlan(names(4), 4, 8, 2)
    server, people = exchange(plan, absent=frozenset({"client-3"}))
    finished = frozenset(server.finished)
    for name in sorted(finished):
        answer = people[name].unmasking(finished)
        if name == "client-0":
            index, share = answer.mask_keys["client-3"]
            forged = bytes([share[0] ^ 1]) + share[1:]
            answer = replace(answer, mask_keys={"client-3": (index, forged)})
        server.receive_unmasking(answer)
    with pytest.raises(AggregationAborted, match="the shares of the key of client-3 do not give that key"):
        server.result()


def test_the_same_share_twice_gives_no_sum():
    plan = AggregationPlan(names(4), 4, 8, 2)
    server, people = exchange(plan, {name: Participant(name, plan) for name in plan.participants})
    finished = frozenset(server.finished)
    answers = [person.unmasking(finished) for person in people.values()]
    first = answers[0].self_masks
    twice = {name: first[name] for name in answers[1].self_masks if name in first}
    server.receive_unmasking(answers[0])
    server.receive_unmasking(replace(answers[1], self_masks=answers[1].self_masks | twice))
    for answer in answers[2:]:
        server.receive_unmasking(answer)
    with pytest.raises(AggregationAborted, match="same share"):
        server.result()


def test_names_that_are_not_in_the_plan_do_not_count_as_finished():
    plan = AggregationPlan(names(4), 4, 8, 2, least=3)
    _, people = exchange(plan)
    with pytest.raises(AggregationAborted, match="only 2 participants finished"):
        people["client-0"].unmasking(frozenset({"client-0", "client-1", "stranger"}))
    with pytest.raises(AggregationAborted, match="this participant did not finish"):
        people["client-0"].unmasking(frozenset(names(4)) - {"client-0"})


def test_a_forged_share_of_a_self_mask_aborts():
    plan = AggregationPlan(names(4), 4, 8, 2)
    server, people = exchange(plan)
    finished = frozenset(server.finished)
    for name, person in people.items():
        answer = person.unmasking(finished)
        if name == "client-2":
            forged = {other: (index, bytes(32)) for other, (index, _) in answer.self_masks.items()}
            answer = replace(answer, self_masks=forged)
        server.receive_unmasking(answer)
    with pytest.raises(AggregationAborted, match=r"self mask of client-. do not give that mask"):
        server.result()
    with pytest.raises(InputError, match="no commitment"):
        Aggregator(plan).receive_keys(replace(people["client-0"].keys(), commitment=b""))
