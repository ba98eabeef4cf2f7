"""Loads: when requests arrive, drawn in advance, and the drivers that serve them and keep the time."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from threading import Lock, Thread
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64

from shared_core import InputError

NANOSECONDS = 1_000_000_000
SPIN_NS = 200_000
"""The kernel wakes a sleeper some 50 µs late: the last 200 µs before an arrival are spun, not slept."""

Target = Callable[[int], Mapping[str, float] | None]
"""Serves that many requests at once and returns when they are done; phases in ns, if it measures any."""


@runtime_checkable
class Clock(Protocol):
    """What the drivers read the time from."""

    def now(self) -> int:
        """Return the time in ns."""
        ...

    def wait_until(self, moment: int) -> None:
        """Return at that time in ns, or at once if it has passed."""
        ...


class WallClock:
    """The machine's monotonic clock, which all its processes share."""

    now = staticmethod(time.perf_counter_ns)

    def wait_until(self, moment: int) -> None:
        """Sleep, then spin."""
        left = moment - time.perf_counter_ns()
        if left > SPIN_NS:
            time.sleep((left - SPIN_NS) / NANOSECONDS)
        while time.perf_counter_ns() < moment:
            pass


@dataclass
class SimulatedClock:
    """A clock that only moves when it is told to; a simulated target advances it by its service time."""

    time: int = 0

    def now(self) -> int:
        """Return the time in ns."""
        return self.time

    def wait_until(self, moment: int) -> None:
        """Jump there."""
        self.time = max(self.time, moment)

    def advance(self, nanoseconds: float) -> None:
        """Let time pass."""
        self.time += round(nanoseconds)


@dataclass(frozen=True)
class Closed:
    """The next request begins when the last one ends: throughput, and service time under no queue.

    Attributes:
        concurrency: Threads that do so at once in one process.
    """

    concurrency: int = 1
    kind: ClassVar[str] = "closed"

    def __post_init__(self) -> None:
        if not 1 <= self.concurrency <= 1024:
            raise InputError("expected 1 to 1024 threads", field="concurrency", value=self.concurrency)


@dataclass(frozen=True)
class Open:
    """Requests arrive at a rate of their own, whether or not earlier ones are done.

    Attributes:
        rate: Requests a second, above 0.
        collect: Micro-batching: up to so many requests are served at once.
        wait_ms: Micro-batching: so long is waited for them, from the arrival of the oldest.
        backlog_limit: Requests that may wait; more means saturation. 0: what arrives in 2 s, at least 50.
    """

    rate: float
    collect: int = field(default=1, kw_only=True)
    wait_ms: float = field(default=0.0, kw_only=True)
    backlog_limit: int = field(default=0, kw_only=True)
    kind: ClassVar[str] = "open"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise InputError("expected requests a second above 0", field="rate", value=self.rate)
        if self.collect < 1:
            raise InputError("expected at least 1 request in a batch", field="collect", value=self.collect)
        if not (math.isfinite(self.wait_ms) and self.wait_ms >= 0):
            raise InputError("expected 0 or more milliseconds", field="wait_ms", value=self.wait_ms)
        if self.backlog_limit < 0:
            raise InputError("expected 0 or more requests", field="backlog_limit", value=self.backlog_limit)

    def gaps(self, count: int) -> Float64[np.ndarray, " count"]:
        """Return the times between arrivals in units of the mean gap."""
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Open):
    """Requests at equal distances."""

    kind: ClassVar[str] = "constant"

    def gaps(self, count: int) -> Float64[np.ndarray, " count"]:
        """Return ones."""
        return np.ones(count)


@dataclass(frozen=True)
class Poisson(Open):
    """Requests that know nothing of one another: exponential gaps.

    Attributes:
        seed: Names the schedule.
    """

    seed: int
    kind: ClassVar[str] = "poisson"

    def gaps(self, count: int) -> Float64[np.ndarray, " count"]:
        """Draw exponential gaps."""
        return np.random.default_rng(self.seed).standard_exponential(count)


@dataclass(frozen=True)
class Gamma(Open):
    """Gaps of a gamma distribution: burstier than Poisson for a shape below 1, steadier above.

    Attributes:
        shape: Shape of the distribution; the squared coefficient of variation of the gaps is 1/shape.
        seed: Names the schedule.
    """

    shape: float
    seed: int
    kind: ClassVar[str] = "gamma"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.shape) and self.shape > 0):
            raise InputError("expected a shape above 0", field="shape", value=self.shape)

    def gaps(self, count: int) -> Float64[np.ndarray, " count"]:
        """Draw gamma gaps of mean 1."""
        return np.random.default_rng(self.seed).standard_gamma(self.shape, count) / self.shape


Load = Closed | Open
CLOSED = Closed()
"""One request after another in one thread."""
_KINDS: dict[str, type[Load]] = {kind.kind: kind for kind in (Closed, Constant, Poisson, Gamma)}


def spec_of(load: Load) -> dict[str, Any]:
    """Return the load as a record states it.

    >>> spec_of(Closed())
    {'kind': 'closed', 'concurrency': 1}
    """
    return {"kind": load.kind, **asdict(load)}


def from_spec(spec: Mapping[str, Any]) -> Load:
    """Read a load back; `duration` and the like that a record adds are not part of it.

    Raises:
        InputError: No such kind, an unknown or missing field, or a value out of its range.

    >>> from_spec({"kind": "poisson", "rate": 50, "seed": 666}).rate
    50
    """
    fields = {name: value for name, value in spec.items() if name not in {"kind", "duration"}}
    kind = _KINDS.get(str(spec.get("kind")))
    if kind is None:
        raise InputError(f"expected one of {', '.join(_KINDS)}", field="kind", value=spec.get("kind"))
    known = kind.__dataclass_fields__
    if unknown := sorted(set(fields) - set(known)):
        raise InputError(f"a {kind.kind} load has {', '.join(known)}", field="load", value=", ".join(unknown))
    try:
        return kind(**fields)
    except TypeError as error:
        raise InputError(f"a {kind.kind} load needs {', '.join(known)} as numbers", field="load") from error


def arrivals(load: Open, seconds: float) -> Int64[np.ndarray, " requests"]:
    """Draw the schedule of the load: the arrivals within that many seconds, ascending, in ns from 0.

    The same load gives the same schedule; a longer one begins with the shorter one.

    Raises:
        InputError: The time is not above 0, or nothing would arrive in it.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise InputError("expected seconds above 0", field="duration", value=seconds)
    count = int(seconds * load.rate + 10 * math.sqrt(seconds * load.rate) + 10)
    while True:
        moments = np.cumsum(load.gaps(count)) / load.rate
        if moments[-1] > seconds:
            break
        count *= 2
    if isinstance(load, Constant):
        moments -= 1 / load.rate  # the first arrives at once: 25 a second for 30 s are 750 requests
    inside = moments[moments < seconds]
    if not len(inside):
        raise InputError(f"nothing arrives in {seconds:g} s at {load.rate:g} requests a second", field="rate")
    return np.round(inside * NANOSECONDS).astype(np.int64)


@dataclass
class Timings:
    """What a driver saw, one entry a request, in ns of its clock.

    Attributes:
        scheduled: When the request was to begin; closed loop: when it began.
        started: When it began to be served.
        completed: When it was done.
        calls: Number of the call that served it: requests of a micro-batch share one.
        phases: Name -> ns of each call, where the target measures them.
        saturated: Whether the queue grew without end; the timings are then those up to the stop.
        backlog: Largest number of requests that had arrived and were not yet being served.
        end: When the driver stopped.
    """

    scheduled: Int64[np.ndarray, " requests"]
    started: Int64[np.ndarray, " requests"]
    completed: Int64[np.ndarray, " requests"]
    calls: Int64[np.ndarray, " requests"]
    phases: dict[str, list[float]]
    saturated: bool
    backlog: int
    end: int

    @property
    def latency(self) -> Int64[np.ndarray, " requests"]:
        """Time from the scheduled arrival to completion; closed loop: service time."""
        return self.completed - self.scheduled

    @property
    def service(self) -> Int64[np.ndarray, " requests"]:
        """Time from the start of serving to completion."""
        return self.completed - self.started

    @property
    def lag(self) -> Int64[np.ndarray, " requests"]:
        """Time from the scheduled arrival to the start of serving."""
        return self.started - self.scheduled


def drive_open(
    load: Open,
    schedule: Int64[np.ndarray, " requests"],
    target: Target,
    clock: Clock | None = None,
    start: int | None = None,
) -> Timings:
    """Serve every request of the schedule, none skipped, none put off by an earlier one.

    Args:
        load: How requests may be collected, and when it is too much.
        schedule: Arrivals in ns after the start.
        target: Serves them, one call at a time.
        clock: Where the time comes from; the machine's by default.
        start: When it begins, in ns of the clock; now by default.

    Returns:
        Timings. Where the backlog exceeds its limit, it stops there and says `saturated`.
    """
    clock = clock or WallClock()
    due: list[int] = (schedule + (clock.now() if start is None else start)).tolist()
    limit = load.backlog_limit or max(50, math.ceil(2 * load.rate))
    wait = round(load.wait_ms * 1e6)
    now, wait_until, collect, total = clock.now, clock.wait_until, load.collect, len(due)
    started: list[int] = []
    completed: list[int] = []
    sizes: list[int] = []
    phases: dict[str, list[float]] = {}
    first = arrived = backlog = 0
    saturated = False
    while first < total:
        wait_until(due[first])
        if wait and first + collect <= total:
            wait_until(min(due[first] + wait, due[first + collect - 1]))
        elif wait:
            wait_until(min(due[first] + wait, due[-1]))
        begin = now()
        while arrived < total and due[arrived] <= begin:
            arrived += 1
        waiting = arrived - first
        if waiting > backlog:
            backlog = waiting
            if waiting > limit:
                saturated = True
                break
        size = waiting if waiting < collect else collect
        measured = target(size)
        done = now()
        if measured:
            for name, value in measured.items():
                phases.setdefault(name, []).append(value)
        started.append(begin)
        completed.append(done)
        sizes.append(size)
        first += size
    calls = np.repeat(np.arange(len(sizes)), sizes)
    timings = Timings(
        scheduled=np.array(due[:first], dtype=np.int64),
        started=np.array(started, dtype=np.int64)[calls],
        completed=np.array(completed, dtype=np.int64)[calls],
        calls=calls.astype(np.int64),
        phases=phases,
        saturated=saturated,
        backlog=backlog,
        end=now(),
    )
    timings.saturated = saturated or _outpaced(timings, due, collect)
    return timings


def _outpaced(timings: Timings, due: list[int], collect: int) -> bool:
    """Whether arrivals outpaced the service, though the schedule ended before the backlog met its limit."""
    count = len(due)
    if count < 2:
        return False
    left = int(np.sum(timings.started > due[-1]))  # still waiting when the last one arrived
    if left <= max(10, 2 * collect):
        return False
    service = (timings.completed - timings.started)[np.flatnonzero(np.diff(timings.calls, prepend=-1))]
    offered = (due[-1] - due[0]) / (count - 1)  # ns between arrivals
    capacity = float(service.sum()) / count  # ns of service a request took
    return capacity >= offered


def drive_closed(
    load: Closed, target: Target, stop: int, clock: Clock | None = None, start: int | None = None
) -> Timings:
    """Call the target again and again until a time has come; the call under way is finished.

    Args:
        load: How many threads do so at once.
        target: Serves one request.
        stop: No call begins at or after this, in ns of the clock.
        clock: Where the time comes from; the machine's by default.
        start: When it begins; now by default.
    """
    clock = clock or WallClock()
    if start is not None:
        clock.wait_until(start)
    rows: list[tuple[int, int]] = []
    phases: dict[str, list[float]] = {}
    lock = Lock()
    failures: list[BaseException] = []

    def serve() -> None:
        mine: list[tuple[int, int]] = []
        measured: list[Mapping[str, float]] = []
        now = clock.now
        try:
            while (begin := now()) < stop:
                result = target(1)
                mine.append((begin, now()))
                if result:
                    measured.append(result)
        except BaseException as failure:
            failures.append(failure)
        with lock:
            rows.extend(mine)
            for one in measured:
                for name, value in one.items():
                    phases.setdefault(name, []).append(value)

    if load.concurrency == 1:
        serve()
    else:
        threads = [Thread(target=serve) for _ in range(load.concurrency)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    times = np.array(rows, dtype=np.int64).reshape(-1, 2)
    if load.concurrency > 1:
        times = times[np.argsort(times[:, 0], kind="stable")]
    begin, done = np.ascontiguousarray(times.T)
    return Timings(begin, begin.copy(), done, np.arange(len(begin)), phases, False, 0, clock.now())
