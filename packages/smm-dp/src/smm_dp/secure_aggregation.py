"""Secure aggregation of vectors over Z_m: the server learns the sum of those who finish, and nothing else.

The protocol of Bonawitz et al. (CCS 2017) in four messages, on the sparse graph of Bell et al. (CCS 2020)
where there are many participants:

1. keys: every participant sends two X25519 public keys;
2. shares: it splits its mask key and a self-mask seed (Shamir, threshold t) and sends each neighbour a share,
   encrypted (AES-256-GCM under a key agreed with that neighbour);
3. masked vector: residues + self mask + a mask per pair of neighbours, which cancels in the sum (AES-256-CTR
   streams under HKDF keys, uniform on Z_m because m is a power of two);
4. unmasking: of every participant, survivors reveal shares of *either* the self mask (it finished) *or* the
   mask key (it dropped out), never both.

The server is honest but curious: it follows the protocol. A participant who forges a share makes the round
abort: rebuilt keys and masks are checked against what their owners sent first. The server may collude with
fewer than t neighbours of a participant. Against a server that lies about keys or about who dropped out,
participants' keys must be signed by a directory that they trust, which is not part of this module.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from jaxtyping import UInt32

from shared_core import InputError
from smm_dp.masks import combine_shares, derive, split_secret, uniform_mask
from smm_dp.packing import check_bits, check_residues, pack_bits, unpack_bits
from smm_dp.randomness import secure_source

_KEY = 32  # bytes of an X25519 key, of a seed, and of a share of either


class AggregationAborted(RuntimeError):
    """Too few participants finished: the sum stays hidden; budget that was charged stays charged."""


@dataclass(frozen=True)
class AggregationPlan:
    """What all parties of one aggregation agree on in public.

    Args:
        participants: Their names, each once.
        length: Residues in a vector.
        bits: b; sums are modulo 2^b.
        threshold: t, shares that unmask; also the least number of neighbours of a participant who finish.
        round_id: Public name of the aggregation; masks of different rounds are unrelated.
        degree: Neighbours of each participant; all others where None. An even number below n.
        least: The round is given up when fewer participants finish: the n_min of the privacy accounting.

    Raises:
        InputError: A name occurs twice, or a number is out of range.
    """

    participants: tuple[str, ...]
    length: int
    bits: int
    threshold: int
    round_id: str = "0"
    degree: int | None = None
    least: int = 2

    def __post_init__(self) -> None:
        check_bits(self.bits)
        names = self.participants
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError("a participant occurs twice", field="participants", value=twice)
        if len(names) < 2:
            raise InputError(
                "a sum hides nobody with fewer than 2 participants", field="participants", value=len(names)
            )
        if self.length < 1:
            raise InputError("expected at least 1 residue", field="length", value=self.length)
        if self.degree is not None and not (2 <= self.degree < len(names) and self.degree % 2 == 0):
            raise InputError(
                f"expected an even number in 2..{len(names) - 1}", field="degree", value=self.degree
            )
        reach = len(names) - 1 if self.degree is None else self.degree
        if not reach / 2 < self.threshold <= reach:
            raise InputError(
                f"with {reach} neighbours the threshold lies above {reach / 2:g} (no two unmaskings) "
                f"and up to {reach}",
                field="threshold",
                value=self.threshold,
            )
        if not 2 <= self.least <= len(names):
            raise InputError(f"expected 2..{len(names)}", field="least", value=self.least)

    def neighbours(self, name: str) -> tuple[str, ...]:
        """Return those with whom a participant shares keys: all others, or a public random ring's nearest."""
        if self.degree is None:
            return tuple(other for other in self.participants if other != name)
        ring = sorted(self.participants)
        random.Random(hashlib.sha256(self.round_id.encode()).digest()).shuffle(ring)  # public, not secret
        place = ring.index(name)
        offsets = range(1, self.degree // 2 + 1)
        return tuple(ring[(place + sign * o) % len(ring)] for o in offsets for sign in (1, -1))


@dataclass(frozen=True)
class PublicKeys:
    """First message: the keys under which shares are encrypted and pairwise masks agreed.

    To the server it also binds the sender to its self mask: `commitment` is the seed's SHA-256.
    """

    sender: str
    encryption: bytes
    masking: bytes
    commitment: bytes = b""


@dataclass(frozen=True)
class Unmasking:
    """Fourth message: for each neighbour one share, of its self mask or of its mask key."""

    sender: str
    self_masks: dict[str, tuple[int, bytes]]
    mask_keys: dict[str, tuple[int, bytes]]


def _is_public_key(key: bytes) -> bool:
    """Whether a key can be agreed with it: right length, not one of the few points of low order."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(key))
    except ValueError:
        return False
    return True


def _mask(seed: bytes, plan: AggregationPlan, purpose: str) -> UInt32[np.ndarray, " d"]:
    return uniform_mask(seed, f"{purpose}/{plan.round_id}", plan.length, plan.bits)


class Participant:
    """One participant of one aggregation; its secrets never leave it unmasked or unencrypted."""

    def __init__(self, name: str, plan: AggregationPlan) -> None:
        if name not in plan.participants:
            raise InputError("not a participant of this aggregation", field="name", value=name)
        self.name, self.plan = name, plan
        self._encryption = X25519PrivateKey.generate()
        self._masking = X25519PrivateKey.generate()
        self._self_mask = secure_source().octets(32).tobytes()
        self._keys: dict[str, PublicKeys] = {}
        self._held: dict[str, tuple[int, bytes]] = {}
        self._masked = self._revealed = False

    def keys(self) -> PublicKeys:
        """Return the first message."""
        encryption, masking = (k.public_key().public_bytes_raw() for k in (self._encryption, self._masking))
        return PublicKeys(self.name, encryption, masking, hashlib.sha256(self._self_mask).digest())

    def shares(self, keys: Mapping[str, PublicKeys]) -> dict[str, bytes]:
        """Return the second message: for every neighbour, its encrypted shares.

        Args:
            keys: First messages of all participants, as the server passes them on.

        Raises:
            AggregationAborted: Fewer than `threshold` neighbours sent keys.
        """
        self._keys = {name: keys[name] for name in self.plan.neighbours(self.name) if name in keys}
        if len(self._keys) < self.plan.threshold:
            raise AggregationAborted(f"{self.name}: only {len(self._keys)} neighbours sent keys")
        secrets = self._masking.private_bytes_raw(), self._self_mask
        parts = [split_secret(secret, self.plan.threshold, len(self._keys)) for secret in secrets]
        out = {}
        for index, (name, mask_key, self_mask) in enumerate(zip(self._keys, *parts, strict=True), start=1):
            plain = index.to_bytes(4, "big") + mask_key + self_mask
            nonce = secure_source().octets(12).tobytes()
            label = f"{self.plan.round_id}|{self.name}|{name}".encode()
            out[name] = nonce + AESGCM(self._channel(name)).encrypt(nonce, plain, label)
        return out

    def masked(self, residues: UInt32[np.ndarray, " d"], shares: Mapping[str, bytes]) -> bytes:
        """Return the third message: the vector under its masks, packed.

        Args:
            residues: This participant's encoded vector, residues modulo 2^bits.
            shares: Encrypted shares from the neighbours who sent some.

        Raises:
            InputError: Not `length` residues; a share was tampered with; a second vector under the same
                masks.
            AggregationAborted: Fewer than `threshold` neighbours sent shares.
        """
        plan = self.plan
        check_residues(residues, plan.length, plan.bits, self.name)
        if self._masked:
            raise InputError(
                "a second vector under the same masks would reveal the difference", field=self.name
            )
        for name, message in shares.items():
            label = f"{plan.round_id}|{name}|{self.name}".encode()
            try:
                plain = AESGCM(self._channel(name)).decrypt(message[:12], message[12:], label)
            except Exception as error:  # cryptography's InvalidTag, or a message too short
                raise InputError(
                    "a share cannot be decrypted: it was altered on the way", field=name
                ) from error
            if len(plain) != 4 + 2 * _KEY:
                raise InputError(f"a share has {len(plain)} bytes, expected {4 + 2 * _KEY}", field=name)
            self._held[name] = int.from_bytes(plain[:4], "big"), plain[4:]
        if len(self._held) < plan.threshold:
            raise AggregationAborted(f"{self.name}: only {len(self._held)} neighbours sent shares")
        total = residues + _mask(self._self_mask, plan, "self")
        for name in self._held:
            total += _pair_mask(self._masking, self._keys[name], self.name, plan)
        self._masked = True
        return pack_bits(total & np.uint32((1 << plan.bits) - 1), plan.bits).tobytes()

    def unmasking(self, finished: frozenset[str]) -> Unmasking:
        """Return the fourth message, once.

        Args:
            finished: Those whose masked vectors the server has.

        Raises:
            AggregationAborted: Fewer than `least` finished, or fewer than `threshold` of the neighbours.
            InputError: A second request, whose answer could reveal both secrets of somebody.
        """
        if self._revealed:
            raise InputError("shares are revealed once: two answers could unmask somebody", field=self.name)
        finished = finished & set(self.plan.participants)
        if self.name not in finished:
            raise AggregationAborted(f"{self.name}: the server says that this participant did not finish")
        near = sum(name in finished for name in self._held)
        if len(finished) < self.plan.least or near < self.plan.threshold:
            raise AggregationAborted(
                f"{self.name}: only {len(finished)} participants finished, {near} of them neighbours"
            )
        self._revealed = True
        self_masks = {name: (i, part[32:]) for name, (i, part) in self._held.items() if name in finished}
        mask_keys = {name: (i, part[:32]) for name, (i, part) in self._held.items() if name not in finished}
        return Unmasking(self.name, self_masks, mask_keys)

    def state(self) -> dict:
        """Return all secrets as plain data, for a process that ends between messages. Keep it private."""
        return {
            "name": self.name,
            "encryption": self._encryption.private_bytes_raw().hex(),
            "masking": self._masking.private_bytes_raw().hex(),
            "self_mask": self._self_mask.hex(),
            "keys": {n: (k.encryption.hex(), k.masking.hex()) for n, k in self._keys.items()},
            "held": {n: (index, share.hex()) for n, (index, share) in self._held.items()},
            "flags": (self._masked, self._revealed),
        }

    @classmethod
    def from_state(cls, state: Mapping, plan: AggregationPlan) -> "Participant":
        """Return the participant that `state` was taken of."""
        person = cls(state["name"], plan)
        person._encryption = X25519PrivateKey.from_private_bytes(bytes.fromhex(state["encryption"]))
        person._masking = X25519PrivateKey.from_private_bytes(bytes.fromhex(state["masking"]))
        person._self_mask = bytes.fromhex(state["self_mask"])
        person._keys = {
            n: PublicKeys(n, bytes.fromhex(e), bytes.fromhex(m)) for n, (e, m) in state["keys"].items()
        }
        person._held = {n: (index, bytes.fromhex(share)) for n, (index, share) in state["held"].items()}
        person._masked, person._revealed = state["flags"]
        return person

    def _channel(self, other: str) -> bytes:
        secret = self._encryption.exchange(X25519PublicKey.from_public_bytes(self._keys[other].encryption))
        return derive(secret, f"channel/{self.plan.round_id}")


def _pair_mask(
    key: X25519PrivateKey, other: PublicKeys, name: str, plan: AggregationPlan
) -> UInt32[np.ndarray, " d"]:
    """Return the mask that `name` adds for a pair; the two of a pair add up to 0 modulo 2^32."""
    shared = key.exchange(X25519PublicKey.from_public_bytes(other.masking))
    mask = _mask(shared, plan, "pair")
    return mask if name < other.sender else np.uint32(0) - mask


@dataclass
class Aggregator:
    """The server: passes messages on, adds masked vectors, and removes the masks of the sum."""

    plan: AggregationPlan
    keys: dict[str, PublicKeys] = field(default_factory=dict)
    sharers: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._mail: dict[str, dict[str, bytes]] = {name: {} for name in self.plan.participants}
        self._total = np.zeros(self.plan.length, np.uint32)
        self._answers: dict[str, Unmasking] = {}

    def receive_keys(self, message: PublicKeys) -> None:
        """Take a first message; a participant sends one.

        Raises:
            InputError: An unknown or a second sender, or what is no pair of X25519 keys.
        """
        self._check_sender(message.sender, self.keys, self.plan.participants)
        for key in (message.encryption, message.masking):
            if not _is_public_key(key):
                raise InputError(f"{message.sender} sent what is no X25519 key", field="keys")
        if len(message.commitment) != _KEY:
            raise InputError(f"{message.sender} sent no commitment to its self mask", field="keys")
        self.keys[message.sender] = message

    def receive_shares(self, sender: str, shares: Mapping[str, bytes]) -> None:
        """Take a second message.

        Raises:
            InputError: An unknown or a second sender, or shares for others than all its neighbours with keys.
        """
        self._check_sender(sender, self.sharers, self.keys)
        expected = {name for name in self.plan.neighbours(sender) if name in self.keys}
        if set(shares) != expected:
            raise InputError(
                f"{sender} sent shares for {len(shares)} names, expected its {len(expected)} neighbours",
                field="shares",
            )
        for name, message in shares.items():
            self._mail[name][sender] = message
        self.sharers.add(sender)

    def mail(self, name: str) -> dict[str, bytes]:
        """Return the encrypted shares addressed to a participant."""
        return dict(self._mail[name])

    def receive_masked(self, sender: str, packed: bytes) -> None:
        """Take a third message and add it up; it is not kept.

        Raises:
            InputError: An unknown or a second sender, or a vector of another length.
        """
        self._check_sender(sender, self.finished, self.sharers)
        plan = self.plan
        size = (plan.length * plan.bits + 7) // 8
        if len(packed) != size:
            raise InputError(f"{sender} sent {len(packed)} bytes, expected {size}", field="masked vector")
        self._total += unpack_bits(np.frombuffer(packed, np.uint8), plan.length, plan.bits)
        self.finished.add(sender)

    def receive_unmasking(self, message: Unmasking) -> None:
        """Take a fourth message.

        Raises:
            InputError: An unknown or a second sender, or what is no share of a key.
        """
        self._check_sender(message.sender, self._answers, self.finished)
        for index, share in (*message.self_masks.values(), *message.mask_keys.values()):
            if not (isinstance(index, int) and 0 < index < 1 << 32 and len(share) == _KEY):
                raise InputError(f"{message.sender} sent what is no share of a key", field="unmasking")
        self._answers[message.sender] = message

    def result(self) -> UInt32[np.ndarray, " d"]:
        """Return the sum of the vectors of those who finished, modulo 2^bits.

        Raises:
            AggregationAborted: Too few finished, or too few answered to remove a mask.
        """
        plan = self.plan
        if len(self.finished) < plan.least:
            raise AggregationAborted(
                f"only {len(self.finished)} of the {plan.least} participants needed finished"
            )
        total = self._total.copy()
        for name in self.finished:
            seed = self._secret(name, "self_masks")
            if hashlib.sha256(seed).digest() != self.keys[name].commitment:
                raise AggregationAborted(f"the shares of the self mask of {name} do not give that mask")
            total -= _mask(seed, plan, "self")
        for name in self.sharers - self.finished:
            self._remove_pair_masks(name, total)
        return total & np.uint32((1 << plan.bits) - 1)

    def _remove_pair_masks(self, dropped: str, total: UInt32[np.ndarray, " d"]) -> None:
        near = [name for name in self.plan.neighbours(dropped) if name in self.finished]
        if not near:
            return
        key = X25519PrivateKey.from_private_bytes(self._secret(dropped, "mask_keys"))
        if key.public_key().public_bytes_raw() != self.keys[dropped].masking:
            raise AggregationAborted(f"the shares of the key of {dropped} do not give that key")
        for name in near:  # what the survivor added for this pair is minus what the dropped one would have
            total += _pair_mask(key, self.keys[name], dropped, self.plan)

    def _secret(self, name: str, kind: str) -> bytes:
        shares = [
            getattr(answer, kind)[name] for answer in self._answers.values() if name in getattr(answer, kind)
        ]
        if len(shares) < self.plan.threshold:
            raise AggregationAborted(
                f"{len(shares)} shares of {name} are too few, {self.plan.threshold} are needed"
            )
        chosen = shares[: self.plan.threshold]
        if len({index for index, _ in chosen}) < len(chosen):
            raise AggregationAborted(f"two participants sent the same share of a key of {name}")
        return combine_shares(chosen)

    @staticmethod
    def _check_sender(sender: str, seen: object, allowed: object) -> None:
        if sender not in allowed:  # pyright: ignore[reportOperatorIssue] sets, dicts and tuples of names
            raise InputError(
                "a message from somebody who is not in this stage of the round", field="sender", value=sender
            )
        if sender in seen:  # pyright: ignore[reportOperatorIssue]
            raise InputError("a second message from the same participant", field="sender", value=sender)


def aggregate_in_process(
    plan: AggregationPlan,
    vectors: Mapping[str, UInt32[np.ndarray, " d"]],
    *,
    drop_before_masking: frozenset[str] = frozenset(),
    drop_after_masking: frozenset[str] = frozenset(),
) -> tuple[UInt32[np.ndarray, " d"], tuple[str, ...]]:
    """Run all parties in this process, message by message: the reference for tests and small simulations.

    Args:
        plan: The aggregation.
        vectors: Residues of each participant.
        drop_before_masking: Those who vanish after sending their shares; their vectors are not in the sum.
        drop_after_masking: Those who vanish after sending their masked vector; their vectors are.

    Returns:
        The sum modulo 2^bits, and the names of those whose vectors are in it.
    """
    server = Aggregator(plan)
    people = {name: Participant(name, plan) for name in plan.participants}
    for person in people.values():
        server.receive_keys(person.keys())
    for name, person in people.items():
        server.receive_shares(name, person.shares(server.keys))
    for name, person in people.items():
        if name not in drop_before_masking:
            server.receive_masked(name, person.masked(vectors[name], server.mail(name)))
    finished = frozenset(server.finished)
    for name in sorted(finished - drop_after_masking):
        server.receive_unmasking(people[name].unmasking(finished))
    return server.result(), tuple(sorted(finished))
