"""Where slides and labels are (CAMELYON16, TCGA, a folder with a label table), and splits by patient."""

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shared_core import InputError, files

SUFFIXES = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".scn", ".mrxs", ".vms", ".vmu", ".bif", ".svslide", ".dcm", ".czi"}
)
"""File names that OpenSlide may open."""


@dataclass(frozen=True)
class SlideRecord:
    """One slide of a data set. `label`, `split` and `annotation` are None where they are not known."""

    path: Path
    patient: str
    label: str | None = None
    split: str | None = None
    annotation: Path | None = None

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem


def patient_of(name: str) -> str:
    """The patient of a slide: the first 12 characters of a TCGA barcode, or else the whole name.

    >>> patient_of("TCGA-05-4244-01Z-00-DX1.d4ff32cd.svs")
    'TCGA-05-4244'
    """
    barcode = re.match(r"TCGA-\w{2}-\w{4}(?![^-.])", name)
    return barcode.group()[:12] if barcode else Path(name).stem


def find_slides(folder: str | os.PathLike[str], suffixes: frozenset[str] = SUFFIXES) -> list[Path]:
    """All slide files under a folder, sorted by path. A file that is given is taken as it is.

    Raises:
        InputError: There is no such folder, or no slide in it.
    """
    root = Path(folder)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise InputError("there is no such file or folder", file=root)
    found = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in suffixes and path.is_file() and not path.name.startswith(".")
    )
    if not found:
        raise InputError(
            f"has no {'slide' if suffixes is SUFFIXES else 'file'} ({', '.join(sorted(suffixes))})", file=root
        )
    return found


def read_labels(
    table: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    known: Sequence[str] | None = None,
    suffixes: frozenset[str] = SUFFIXES,
) -> list[SlideRecord]:
    """Read a CSV with the columns `WSI_path,label` (and, where there is one, `patient`, `split`).

    `WSI_path` is a path in `folder`, or a file name that occurs once under it, with or without its suffix.

    Args:
        table: The CSV file.
        folder: Where the slides are.
        known: The labels that may occur; any where None.
        suffixes: Of the files in `folder`; with other ones than slides' (features, predictions) rows still
            name slides, and files are called like them.

    Raises:
        InputError: A column is missing; or rows name slides that are not there, slides twice, no label or
            an unknown one, or slides of the folder have no row. All such problems are in the one message.
    """
    rows = _rows(table)
    slides = find_slides(folder, suffixes)
    by_name: dict[str, list[Path]] = {}
    for path in slides:
        relative = path.relative_to(folder) if Path(folder).is_dir() else Path(path.name)
        names = {relative.as_posix(), relative.with_suffix("").as_posix(), path.name, path.stem, str(path)}
        for name in names:
            by_name.setdefault(name, []).append(path)
    problems: list[str] = []
    records: list[SlideRecord] = []
    used: dict[Path, int] = {}
    for line, row in enumerate(rows, start=2):
        name, label = (row["WSI_path"] or "").strip(), (row["label"] or "").strip()
        matches = by_name.get(name, [])
        if not matches and suffixes is not SUFFIXES:
            matches = by_name.get(str(Path(name).with_suffix("")), []) or by_name.get(Path(name).stem, [])
        if len(matches) != 1:
            problems.append(
                f"line {line}: {'several slides are' if matches else 'there is no slide'} {name!r}"
            )
            continue
        path = matches[0]
        if path in used:
            problems.append(f"line {line}: {name!r} stands in line {used[path]} too")
        if not label:
            problems.append(f"line {line}: {name!r} has no label")
        elif known is not None and label not in known:
            problems.append(f"line {line}: label {label!r} is none of {', '.join(known)}")
        used.setdefault(path, line)
        patient = (row.get("patient") or "").strip() or patient_of(path.name)
        records.append(SlideRecord(path, patient, label, (row.get("split") or "").strip() or None))
    problems += [f"{path.name} has no row" for path in slides if path not in used]
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise InputError(f"{len(problems)} problems: {shown}", file=table)
    return records


def camelyon16(root: str | os.PathLike[str]) -> list[SlideRecord]:
    """The slides of CAMELYON16 as it is distributed, with the official split.

    ```
    training/normal/normal_001.tif    training/tumor/tumor_001.tif    testing/images/test_001.tif
    training/lesion_annotations/tumor_001.xml (where unpacked)    testing/lesion_annotations/test_001.xml
    testing/reference.csv: test_001,Tumor,...
    ```

    Raises:
        InputError: A folder is missing, or test slides are without a row in reference.csv.
    """
    root = Path(root)
    wanted = ("training/normal", "training/tumor", "testing/images")
    absent = [name for name in wanted if not (root / name).is_dir()]
    if absent:
        raise InputError(f"expected the folders {', '.join(wanted)}; missing: {', '.join(absent)}", file=root)
    records = []
    for kind in ("normal", "tumor"):
        for path in find_slides(root / "training" / kind):
            annotation = _there(root / "training/lesion_annotations" / f"{path.stem}.xml")
            records.append(SlideRecord(path, path.stem, kind, "train", annotation))
    reference = root / "testing/reference.csv"
    if not reference.is_file():
        raise InputError("is missing; it has the labels of the test slides", file=reference)
    with open(reference, encoding="utf-8-sig", newline="") as file:
        answers = {
            Path(row[0].strip()).stem: row[1].strip().lower() for row in csv.reader(file) if len(row) > 1
        }
    problems = []
    for path in find_slides(root / "testing/images"):
        label = answers.get(path.stem)
        if label not in ("normal", "tumor"):
            problems.append(path.stem if label is None else f"{path.stem} ({label!r})")
            continue
        annotation = _there(root / "testing/lesion_annotations" / f"{path.stem}.xml")
        records.append(SlideRecord(path, path.stem, label, "test", annotation))
    if problems:
        raise InputError(
            f"expected a row NAME,Normal or NAME,Tumor for each test slide; missing: {', '.join(problems)}",
            file=reference,
        )
    return records


def tcga(
    root: str | os.PathLike[str], labels: Mapping[str, str] | str | os.PathLike[str] | None = None
) -> list[SlideRecord]:
    """The slides of a TCGA download: one folder a file, or all in one; names that begin with the barcode.

    Args:
        root: The folder. Below it, folders named after the project (TCGA-LUAD, LUSC) give labels if `labels`
            does not.
        labels: Patient barcode (12 characters) to label, or a label CSV as for `read_labels`.

    Raises:
        InputError: A name is no barcode, or a slide is without label. All such slides are in the one message.
    """
    root = Path(root)
    if isinstance(labels, str | os.PathLike):
        return read_labels(labels, root)
    records, problems = [], []
    for path in find_slides(root):
        patient = patient_of(path.name)
        if not patient.startswith("TCGA-") or len(patient) != 12:
            problems.append(f"{path.name} is no TCGA barcode")
            continue
        label = labels.get(patient) if labels is not None else _project(path.relative_to(root))
        if label is None:
            problems.append(f"{path.name} has no label")
        records.append(SlideRecord(path, patient, label))
    if problems:
        raise InputError(f"{len(problems)} problems: {'; '.join(problems[:20])}", file=root)
    return records


def public_layout(root: str | os.PathLike[str]) -> list[SlideRecord]:
    """The slides of a data set as it is distributed: CAMELYON16 if it has its folders, or else TCGA.

    Raises:
        InputError: As `camelyon16` or `tcga`.
    """
    parts = [Path(root, name) for name in ("training/normal", "training/tumor", "testing/images")]
    return camelyon16(root) if any(part.is_dir() for part in parts) else tcga(root)


def write_labels(
    out: str | os.PathLike[str], records: Sequence[SlideRecord], root: str | os.PathLike[str]
) -> None:
    """Write a label table as `read_labels` takes it, with paths from `root`.

    Args:
        out: The CSV file, written atomically.
        records: The slides.
        root: The folder that they are in.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["WSI_path", "label", "patient", "split"])
    for record in records:
        path = record.path.relative_to(root).as_posix()
        writer.writerow([path, record.label or "", record.patient, record.split or ""])
    files.write_text(out, text.getvalue())


def split_patients(
    records: Sequence[SlideRecord],
    shares: Mapping[str, float],
    seed: int = 0,
) -> list[SlideRecord]:
    """Split by patient, so that no patient's slides stand on two sides; each class in about the given shares.

    Args:
        records: The slides. A patient with slides of several labels counts as the label met first.
        shares: Name of a split to its share of patients; the shares add up to 1.
        seed: Which of the possible splits.

    Returns:
        The same slides in the same order with `split` set.

    Raises:
        InputError: Shares do not add up to 1, or a class has fewer patients than there are splits.
    """
    if abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values(), default=0) <= 0:
        raise InputError("expected shares above 0 that add up to 1", field="shares", value=dict(shares))
    label_of: dict[str, str] = {}
    for record in records:
        label_of.setdefault(record.patient, record.label or "")
    rng = np.random.default_rng(seed)
    split_of: dict[str, str] = {}
    for label in sorted(set(label_of.values())):
        patients = sorted(patient for patient, own in label_of.items() if own == label)
        if len(patients) < len(shares):
            raise InputError(
                f"label {label!r} has {len(patients)} patients, "
                f"expected at least one for each of {len(shares)} splits"
            )
        rng.shuffle(patients)
        split_of |= _cut(patients, shares)
    return [replace(record, split=split_of[record.patient]) for record in records]


def _cut(patients: Sequence[str], shares: Mapping[str, float]) -> dict[str, str]:
    """Cut a list into parts of about the given shares, none of them empty."""
    counts = {name: max(1, int(share * len(patients))) for name, share in shares.items()}
    while sum(counts.values()) > len(patients):
        counts[max(counts, key=lambda name: counts[name] - shares[name] * len(patients))] -= 1
    while sum(counts.values()) < len(patients):
        counts[min(counts, key=lambda name: counts[name] - shares[name] * len(patients))] += 1
    names = [name for name, count in counts.items() for _ in range(count)]
    return dict(zip(patients, names, strict=True))


def _rows(table: str | os.PathLike[str]) -> list[dict[str, str]]:
    with open(table, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            rows = list(reader)
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"not a CSV file in UTF-8: {error}", file=table) from error
    columns = reader.fieldnames or []
    absent = [name for name in ("WSI_path", "label") if name not in columns]
    if absent:
        raise InputError(
            f"expected the columns WSI_path,label; missing: {', '.join(absent)}",
            file=table,
            value=",".join(columns),
        )
    if not rows:
        raise InputError("has no rows", file=table)
    return rows


def _there(path: Path) -> Path | None:
    return path if path.is_file() else None


def _project(relative: Path) -> str | None:
    for part in relative.parts[:-1]:
        project = re.fullmatch(r"(?:TCGA[-_])?([A-Z]{3,4})", part)
        if project:
            return project.group(1)
    return None
