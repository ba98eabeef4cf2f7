"""The command: devices, geometries, measurements, recommendations, the proof."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared_core import InputError
from shared_core.command import ProofFolder, Quick, Seeds, file_to_write, folder_to_write, print_table, run

if TYPE_CHECKING:
    from migperf.backends import Backend

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Measures deep-learning work on partitions of an accelerator, and recommends a partition.",
)


class PlanFormat(StrEnum):
    """How a plan is printed."""

    TEXT = "text"
    NVIDIA_SMI = "nvidia-smi"
    MIG_PARTED = "mig-parted"
    K8S = "k8s"


class AnswerFormat(StrEnum):
    """How a recommendation is printed."""

    TEXT = "text"
    JSON = "json"
    MIG_PARTED = "mig-parted"
    K8S = "k8s"


class Plugin(StrEnum):
    """Strategy of NVIDIA's device plugin on the node."""

    MIXED = "mixed"
    SINGLE = "single"


class Better(StrEnum):
    """What a recommendation makes best, after the objectives of latency."""

    THROUGHPUT = "throughput"
    FAIRNESS = "fairness"
    ENERGY = "energy"
    COST = "cost"


DEVICE_HELP = "nvml:0 (MIG), cuda:0 (a GPU without MIG), cpu, sim:a100-40gb, or sim:a100-40gb@gpu.json"
Device = Annotated[str, typer.Option(help=DEVICE_HELP)]
Consent = Annotated[bool, typer.Option(help="MIG mode may be turned on and off")]
Wanted = Annotated[str, typer.Argument(help='such as "3g.20gb@4,2g,1g*2"; starts may be left out')]
Out = Annotated[
    Path,
    typer.Option(
        help="folder of records; finished cells in it are not measured again", callback=folder_to_write
    ),
]
Seconds = Annotated[float, typer.Option(help="of each measured window")]
Repeats = Annotated[int, typer.Option(help="how often each cell is measured")]
Seed = Annotated[int, typer.Option(help="of the order of cells and of arrivals")]
Batches = Annotated[list[int] | None, typer.Option(help="items of a step; may be repeated")]
Rates = Annotated[
    list[float] | None, typer.Option(help="requests a second, Poisson, at each instance; may be repeated")
]
Mode = Annotated[str, typer.Option(help="infer, train or generate")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="field=value of the workload: image_size=64, dtype=float16")
]


def _open(spec: str, allow_mode_change: bool = False) -> "Backend":
    from migperf.backends.opening import open as open_device

    # A simulated GPU that ends with this process is nobody else's.
    own = spec.startswith("sim:") and "@" not in spec
    return open_device(spec, allow_mode_change=allow_mode_change or own)


def _layout(spec: str) -> Any:
    """Return what the device can be cut into: asked of a device, looked up for a model's bare name."""
    from migperf.profiles import devices, layout

    if spec.partition(":")[0] in ("nvml", "cuda", "sim", "cpu"):
        return _open(spec).layout
    known = {name.lower() for name in devices()}
    if spec.lower() in known:
        return layout(spec)
    return _open(spec).layout  # whose error says what there is


@app.command("devices")
def list_devices() -> None:
    """List the devices that are here, and the models that can be simulated."""
    from migperf.listings import devices

    print_table(devices())


@app.command()
def profiles(device: Device = "cpu") -> None:
    """List the sizes of instance that a device can be cut into."""
    from migperf.listings import profiles as table

    print_table(table(_layout(device)))


@app.command()
def placements(
    device: Device = "cpu",
    profile: Annotated[str | None, typer.Option(help="only this one")] = None,
) -> None:
    """List where each profile may begin, and where it would fit beside the instances that exist now."""
    from migperf.listings import placements as table

    print_table(table(_open(device), profile))


@app.command()
def geometries(
    device: Device = "sim:a100-40gb",
    maximal: Annotated[bool, typer.Option(help="only those to which nothing can be added")] = False,
    every: Annotated[bool, typer.Option("--all", help="with doubled memory and media engines (+me)")] = False,
    profile: Annotated[list[str] | None, typer.Option(help="only of these profiles")] = None,
    multisets: Annotated[bool, typer.Option(help="without starts, each set of profiles once")] = False,
    legacy_driver: Annotated[bool, typer.Option(help="without what drivers before R510 refuse")] = False,
    count: Annotated[bool, typer.Option(help="only how many there are")] = False,
) -> None:
    """List every way to cut a device."""
    from migperf.geometry import enumerate_geometries

    if every and profile:
        raise InputError("expected --all or --profile, not both", field="--all")
    found = enumerate_geometries(
        _layout(device), profile or ("all" if every else "base"),
        maximal=maximal, multisets=multisets, legacy_driver=legacy_driver,
    )  # fmt: skip
    typer.echo(len(found) if count else "\n".join(map(str, found)))


@app.command()
def plan(
    geometry: Wanted,
    device: Device = "sim:a100-40gb",
    output: Annotated[PlanFormat, typer.Option("--format", help="how it is printed")] = PlanFormat.TEXT,
    name: Annotated[str, typer.Option(help="of the configuration in mig-parted and k8s")] = "migperf",
    strategy: Annotated[Plugin, typer.Option(help="k8s: of the device plugin on the node")] = Plugin.MIXED,
) -> None:
    """Say where instances would go and which steps lead there; nothing is changed."""
    from migperf import exports, plans
    from migperf.geometry import Geometry

    backend = _open(device)
    steps = plans.plan(backend, Geometry.parse(geometry, backend))
    if output is PlanFormat.MIG_PARTED:
        typer.echo(exports.mig_parted(steps.geometry, name), nl=False)
    elif output is PlanFormat.K8S:
        typer.echo(exports.kubernetes(steps.geometry, name, strategy.value), nl=False)
    elif output is PlanFormat.NVIDIA_SMI:
        typer.echo("\n".join(exports.nvidia_smi(steps, _index(device))))
    else:
        typer.echo(f"{steps.geometry}\n{steps}")


def _index(spec: str) -> int:
    number = spec.partition(":")[2]
    return int(number) if number.isdigit() else 0


def _durable(spec: str, allow_mode_change: bool) -> "Backend":
    from migperf.errors import DeviceError

    backend = _open(spec, allow_mode_change)
    if not backend.durable:
        raise DeviceError(
            f"{spec}: its instances end with the process that made them, there is nothing to leave behind "
            "(sim:a100-40gb@gpu.json is one that stays)"
        )
    return backend


@app.command()
def apply(
    geometry: Wanted,
    device: Device = "nvml:0",
    allow_mode_change: Consent = False,
    dry_run: Annotated[bool, typer.Option(help="only say what would be done")] = False,
) -> None:
    """Cut a device and leave it so; instances that fit stay as they are."""
    from migperf import plans
    from migperf.geometry import Geometry
    from migperf.journal import partitioned

    backend = _durable(device, allow_mode_change)
    wanted = Geometry.parse(geometry, backend).require()
    steps = plans.plan(backend, wanted)
    if dry_run:
        typer.echo(steps)
    else:
        with partitioned(backend, wanted, keep=True) as instances:
            typer.echo(steps)  # those taken: a refusal prints none
            for instance in instances:
                typer.echo(f"{instance.profile.name}@{instance.start} {instance.uuid}")


@app.command()
def clear(
    device: Device = "nvml:0",
    restore: Annotated[
        bool, typer.Option("--restore", help="go back to what a killed process found, per its journal")
    ] = False,
    allow_mode_change: Consent = False,
    dry_run: Annotated[bool, typer.Option(help="only say what would be done")] = False,
) -> None:
    """Remove all instances of a device, or put back what a killed process left changed."""
    from migperf import journal, plans
    from migperf.geometry import Geometry

    backend = _durable(device, allow_mode_change)
    left = journal.pending(backend)
    if restore:
        if left is None or dry_run:
            typer.echo("nothing to restore" if left is None else f"would be undone: {left}")
            return
        typer.echo(f"restored {left.geometry(backend)}\n{journal.restore(backend)}")
        return
    empty = Geometry(backend.layout)
    steps = plans.plan(backend, empty)
    if not dry_run and backend.instances():
        with journal.partitioned(backend, empty, keep=True):
            pass
    typer.echo(steps)


class _Progress:
    """A bar on stderr, for those who look at it."""

    def __enter__(self) -> "_Progress":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self.bar.start()
        self.task = self.bar.add_task("")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        self.bar.update(self.task, completed=done, total=total, description=what[:60])


def _show(records: Any, folder: Path | None) -> None:
    """Print what was measured; exit with 5 where a cell tells nothing."""
    from migperf import summaries

    rows = summaries.rows(records, folder)
    for row in rows:
        typer.echo(summaries.text(row))
    for one in summaries.comparisons(rows):
        tail = "" if one.p99_ratio is None else f", p99 x{one.p99_ratio:.2f}"
        mark = "" if one.row.clean and one.whole.clean else " (contaminated)"
        what = f"{one.row.workload.split()[0]}, batch {one.row.batch}"
        typer.echo(f"{one.row.label}, {what}: x{one.gain or 0:.2f} of {one.whole.label}{tail}{mark}")
    summaries.require_usable(rows)


def _loads(concurrency: list[int] | None, rates: list[float] | None, seed: int, seconds: float) -> list[Any]:
    from migperf.latency import too_short_for_p99
    from migperf.loads import Closed, Poisson

    found: list[Any] = [Closed(threads) for threads in concurrency or ([] if rates else [1])]
    for rate in rates or []:
        found.append(Poisson(rate, seed=seed))
        if short := too_short_for_p99(rate, seconds):
            typer.echo(f"note: {short}", err=True)
    return found


def _workload(name: str, mode: str, batch: int, settings: list[str] | None) -> Any:
    import yaml

    from migperf.workloads import parse

    options: dict[str, Any] = {}
    for setting in settings or []:
        field, equals, value = setting.partition("=")
        if not equals:
            raise InputError("expected field=value", field="--set", value=setting)
        options[field] = yaml.safe_load(value)
    return parse(name, mode=mode, batch=batch, **options)


@app.command()
def bench(
    config: Annotated[Path, typer.Argument(help="YAML: devices, their parts, and the jobs in them")],
    out: Out,
    allow_mode_change: Consent = False,
) -> None:
    """Run what a file says: which job in which part of which device."""
    from migperf.benching import bench as measure

    with _Progress() as progress:
        found = measure(
            config, out, open_device=lambda spec: _open(spec, allow_mode_change), progress=progress
        )
    _show(found, out)


@app.command()
def sweep(
    out: Out,
    device: Device = "cpu",
    geometry: Annotated[list[str] | None, typer.Option(help="may be repeated")] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(help="torchvision/NAME, timm/NAME, transformers/NAME, module:callable; may be repeated"),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            help="instead: one of the paper's studies: inference, sequence, training, training-sequence, "
            "compute, sharing, models, rates"
        ),
    ] = None,
    mode: Mode = "infer",
    batch: Batches = None,
    settings: Settings = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="threads of a closed loop")] = None,
    rate: Rates = None,
    duration: Seconds = 10.0,
    repeats: Repeats = 3,
    seed: Seed = 0,
    allow_mode_change: Consent = False,
) -> None:
    """Measure geometries with workloads under loads, interleaved at random; goes on where it stopped."""
    from migperf.presets import paper
    from migperf.sweeps import cells
    from migperf.sweeps import sweep as measure

    backend = _open(device, allow_mode_change)
    if (study is None) == (not geometry or not workload):
        raise InputError("expected either --study, or --geometry and --workload", field="sweep")
    if study is not None:
        wanted = paper(study, backend)
    else:
        works = [_workload(name, mode, one, settings) for name in workload or [] for one in batch or [1]]
        wanted = cells(geometry or [], works, _loads(concurrency, rate, seed, duration))
    with _Progress() as progress:
        found = measure(
            backend, wanted, out, duration=duration, repeats=repeats, seed=seed, progress=progress
        )
    _show(found, out)


@app.command()
def share(
    workload: Annotated[str, typer.Argument(help="torchvision/NAME, timm/NAME, transformers/NAME, ...")],
    device: Device = "cpu",
    workers: Annotated[int, typer.Option(help="processes that share the device")] = 2,
    mode: Mode = "infer",
    batch: Annotated[int, typer.Option(help="items of a step")] = 1,
    settings: Settings = None,
    rate: Annotated[float | None, typer.Option(help="requests a second, Poisson, at each process")] = None,
    duration: Seconds = 10.0,
    repeats: Repeats = 3,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="folder for records", callback=folder_to_write)] = None,
    allow_mode_change: Consent = False,
) -> None:
    """Measure the ways to share a device: partition, time slices, MPS, unpinned with both thread settings."""
    import tempfile

    from migperf.sharing import share as measure

    (load,) = _loads(None, None if rate is None else [rate], seed, duration)
    backend = _open(device, allow_mode_change)
    with tempfile.TemporaryDirectory() as spare:
        folder = Path(spare) if out is None else out
        with _Progress() as progress:
            results = measure(
                backend, _workload(workload, mode, batch, settings), workers, load,
                duration=duration, repeats=repeats, seed=seed, folder=folder, progress=progress,
            )  # fmt: skip
        for name, result in results.items():
            if result.problem:
                typer.echo(f"{name}: not measured: {result.problem}")
        _show([record for result in results.values() for record in result.records], folder)
    typer.echo(f"instances of {backend.layout.device} still share: {', '.join(backend.not_isolated)}")


@app.command()
def compat(
    device: Device = "cpu",
    geometry: Annotated[str | None, typer.Option(help="its first two instances are probed")] = None,
    framework: Annotated[list[str] | None, typer.Option(help="only these; may be repeated")] = None,
    allow_mode_change: Consent = False,
) -> None:
    """Probe which frameworks run in an instance, each in a process of its own."""
    from migperf.compatibility import compat as probe
    from migperf.errors import DeviceError
    from migperf.listings import answers
    from migperf.sweeps import cut

    backend = _open(device, allow_mode_change)
    if backend.simulated:
        raise DeviceError(f"{device} exists only as a table: no framework can run on it")
    smallest = min(backend.profiles(), key=lambda one: (one.slices, one.size, one.name))
    with cut(backend, geometry or smallest.name) as instances:
        print_table(answers(probe(backend, instances, framework)))


@app.command()
def recommend(
    jobs: Annotated[Path, typer.Argument(help="YAML or JSON list: inference has a rate, training a batch")],
    table: Annotated[
        list[str],
        typer.Option(help="folder of records, or official-a100: its published figures; one for each device"),
    ],
    device: Annotated[list[str], typer.Option(help=f"{DEVICE_HELP}; repeated: one mix over all of them")],
    objective: Annotated[Better, typer.Option(help="what is made best")] = Better.THROUGHPUT,
    predict: Annotated[
        bool, typer.Option(help="missing cells by the two-resource law, marked as predicted")
    ] = True,
    legacy_driver: Annotated[bool, typer.Option(help="without what drivers before R510 refuse")] = False,
    output: Annotated[AnswerFormat, typer.Option("--format", help="how it is printed")] = AnswerFormat.TEXT,
    confirm: Annotated[bool, typer.Option("--confirm", help="run it with all jobs and compare")] = False,
    duration: Seconds = 10.0,
    repeats: Repeats = 3,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="folder for the records of --confirm", callback=folder_to_write)
    ] = None,
    allow_mode_change: Consent = False,
) -> None:
    """Say which partition is best for a mix of jobs, exactly; exit 4 where none carries them all."""
    from migperf.answers import fleet, single

    backends = [_open(spec, allow_mode_change) for spec in device]
    if len(table) not in (1, len(device)):
        raise InputError(f"expected 1 or {len(device)}, one a device", field="--table", value=len(table))
    if len(backends) > 1:
        if (
            confirm
            or output in (AnswerFormat.MIG_PARTED, AnswerFormat.K8S)
            or objective is not Better.THROUGHPUT
        ):
            raise InputError(
                "several devices are planned for throughput, as text or json, without --confirm",
                field="--device",
            )
        tables = table * len(device) if len(table) == 1 else table
        typer.echo(fleet(jobs, backends, tables, predict=predict, json=output is AnswerFormat.JSON))
        return
    for text in single(
        jobs, backends[0], table[0], objective=objective.value, predict=predict, legacy_driver=legacy_driver,
        output=output.value, confirm=confirm, duration=duration, repeats=repeats, seed=seed, folder=out,
    ):  # fmt: skip
        typer.echo(text)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="with records.jsonl")],
    out: Annotated[
        Path,
        typer.Option(help="the page; of simulated records: ....simulated.html", callback=file_to_write()),
    ] = Path("report.html"),
    csv: Annotated[
        Path | None, typer.Option(help="also a table with one line a record", callback=file_to_write())
    ] = None,
    prometheus: Annotated[
        Path | None, typer.Option(help="also a page for Prometheus", callback=file_to_write())
    ] = None,
    mixed: Annotated[bool, typer.Option(help="real and simulated records on one page")] = False,
) -> None:
    """Write one self-contained page with tables and plots of what was measured."""
    from migperf import page, records
    from migperf.prometheus import write_prometheus

    typer.echo(f"written: {page.report(folder, out, mixed=mixed)}")
    found = records.read(folder, mixed=mixed)
    if csv is not None:
        target = page.marked(csv) if any(record.simulated for record in found) else csv
        records.write_csv(found, target)
        typer.echo(f"written: {target}")
    if prometheus is not None:
        typer.echo(f"written: {write_prometheus(found, prometheus)}")


@app.command("import-official")
def import_official(
    paths: Annotated[list[Path], typer.Argument(help="result files of the official project, or folders")],
    out: Annotated[Path, typer.Option(help="folder for records", callback=folder_to_write)],
) -> None:
    """Read the official project's JSON results as records."""
    from migperf.official import import_official as read

    result = read(list(paths))
    typer.echo(f"written: {len(result.records)} records to {result.save(out)}")
    for record in result.records:
        for warning in record.extra["warnings"]:
            typer.echo(f"note: {record.cell}: {warning}")


@app.command()
def prove(
    out: ProofFolder = Path("runs/migperf"),
    seeds: Seeds = 3,
    quick: Quick = False,
) -> None:
    """Prove the method's claims on this machine; exit 0 where they hold, 1 where not."""
    from migperf.proof import run_proof

    raise typer.Exit(run_proof(out, range(seeds), quick))


def main() -> None:
    """Run the command."""
    run(app)
