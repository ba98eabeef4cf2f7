"""Lesion outlines from ASAP's XML files, for judging where an agent looked."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import shapely
from jaxtyping import Bool, Int64

from shared_core import InputError, files

# CAMELYON16 calls tumour _0 and _1, and normal tissue inside a tumour _2; CAMELYON17 writes words.
EXCLUSIONS = frozenset({"_2", "normal", "exclusion"})


@dataclass(frozen=True)
class Annotations:
    """Outlined lesions of a slide, in level-0 pixels.

    Attributes:
        lesions: One polygon each, with parts that are annotated as normal cut out.
        groups: The ASAP group of each lesion.
    """

    lesions: Sequence[shapely.Geometry]
    groups: Sequence[str]

    def __len__(self) -> int:
        return len(self.lesions)

    def hits(
        self, xy: Int64[np.ndarray, "regions 2"], footprint: int, share: float = 0.0
    ) -> Bool[np.ndarray, " regions"]:
        """Which square regions hold lesion.

        Args:
            xy: Top-left corners, level-0 pixels.
            footprint: Side of the squares, level-0 pixels.
            share: Least share of a region's area; more than nothing where 0.
        """
        if not self.lesions or not len(xy):
            return np.zeros(len(xy), bool)
        lesion = shapely.union_all(list(self.lesions))
        shapely.prepare(lesion)
        boxes = shapely.box(xy[:, 0], xy[:, 1], xy[:, 0] + footprint, xy[:, 1] + footprint)
        covered = shapely.area(shapely.intersection(boxes, lesion)) / footprint**2
        return covered >= share if share > 0 else covered > 0


def read_annotations(path: str | os.PathLike[str], exclusions: Iterable[str] = EXCLUSIONS) -> Annotations:
    """Read an ASAP annotation file.

    Args:
        path: The XML file.
        exclusions: Groups (in any case) that are cut out of the others.

    Raises:
        InputError: It is not XML, has no annotations at all, or an outline has fewer than three points.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise InputError(f"not an XML file: {error}", file=path) from error
    if root.tag != "ASAP_Annotations":
        raise InputError("expected ASAP's <ASAP_Annotations>", file=path, value=f"<{root.tag}>")
    left_out = {name.casefold() for name in exclusions}
    lesions, groups, cut = [], [], []
    for element in root.iter("Annotation"):
        outline = _polygon(element, path)
        group = element.get("PartOfGroup", "")
        if outline is None:
            continue
        if group.casefold() in left_out:
            cut.append(outline)
        else:
            lesions.append(outline)
            groups.append(group)
    if cut:
        normal = shapely.union_all(cut)
        lesions = [shapely.difference(lesion, normal) for lesion in lesions]
    return Annotations(lesions, groups)


def write_annotations(
    path: str | os.PathLike[str], outlines: Sequence[np.ndarray], group: str = "_0"
) -> None:
    """Write outlines, each (points, 2) in level-0 pixels, as an ASAP file of one group."""
    root = ElementTree.Element("ASAP_Annotations")
    listed = ElementTree.SubElement(root, "Annotations")
    for index, outline in enumerate(outlines):
        element = ElementTree.SubElement(
            listed,
            "Annotation",
            Name=f"Annotation {index}",
            Type="Polygon",
            PartOfGroup=group,
            Color="#F4FA58",
        )
        points = ElementTree.SubElement(element, "Coordinates")
        for order, (x, y) in enumerate(outline):
            ElementTree.SubElement(
                points, "Coordinate", Order=str(order), X=f"{float(x):g}", Y=f"{float(y):g}"
            )
    described = ElementTree.SubElement(root, "AnnotationGroups")
    ElementTree.SubElement(described, "Group", Name=group, PartOfGroup="None", Color="#F4FA58")
    files.write_bytes(path, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _polygon(element: ElementTree.Element, path: str | os.PathLike[str]) -> shapely.Geometry | None:
    """The element's outline; None for kinds without area (dots, measured lines)."""
    kind, name = element.get("Type", ""), element.get("Name", "")
    if kind not in ("Polygon", "Spline", "Rectangle"):
        return None
    try:
        found = [
            (int(float(point.attrib["Order"])), _number(point.attrib["X"]), _number(point.attrib["Y"]))
            for point in element.iter("Coordinate")
        ]
    except (KeyError, ValueError) as error:
        raise InputError(
            f"a coordinate needs numbers Order, X and Y ({error})", file=Path(path), field=name
        ) from error
    if len(found) < 3:
        raise InputError(
            "expected an outline of at least 3 points", file=Path(path), field=name, value=len(found)
        )
    # Drawn by hand, outlines cross themselves; make_valid keeps their area.
    return shapely.make_valid(shapely.Polygon([(x, y) for _, x, y in sorted(found)]))


def _number(text: str) -> float:
    return float(text.replace(",", "."))  # ASAP writes the decimal comma of some locales
