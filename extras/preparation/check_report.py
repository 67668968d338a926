"""The text report of `python data.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from tabulate import tabulate

from segmentation.classes import name_classes

# Maximum number of similar problems to print.
SHOWN = 20
# Maximum length of a row title, in characters.
TITLE = 60
# The row titles and cell formats of the image-size table.
SIZE_ROWS = {
    "images": "{photos:,}",
    "masks": "{masks:,}",
    "good pairs": "{good_pairs:,}",
    "mean size": "{width_mean:.0f}x{height_mean:.0f}",
    "shortest, longest side": "{shortest_side}, {longest_side}",
    "megapixels, mean": "{megapixels_mean:.3f}",
    "megapixels, 90th percentile": "{megapixels_90_percent_below:.3f}",
    "megapixels, largest": "{megapixels_largest:.3f}",
    "pixels without a class": "{unlabelled:.1%}",
}


def as_text(report: dict[str, Any]) -> str:
    """Format the report as text.

    Args:
        report: The report from `validate`.
    """
    lines = [f"{report['path']}: {report['format']}, {report['num_classes']} classes", ""]
    if any(split["good_pairs"] for split in report["splits"].values()):
        lines += [*_size_table(report["splits"]), "", *_class_table(report["splits"]), ""]
    if loader := report["loader"]:
        image, target = loader["batches"][0]
        lines += [
            f"loader: {loader['images_per_second']:.0f} images/s with {loader['workers']} worker "
            f"processes, batches of images {image} and masks {target}",
            "",
        ]
    for title, key in (("odd, but no problem for training", "oddities"), ("PROBLEMS", "problems")):
        if found := report[key]:
            lines += [f"{title} ({len(found)})", *_first_of_each_kind(found), ""]
    return "\n".join([*lines, _verdict(report)])


def _verdict(report: dict[str, Any]) -> str:
    """Return the last line of the report, which says whether training would work."""
    if report["problems"]:
        return "training would fail; fix the problems above"
    classes = report["splits"]["train"]["classes"]
    missing = [entry["name"] for entry in classes if not entry["photos"]]
    if len(missing) == len(classes):
        return "training would work but learn nothing: no training mask has a labelled pixel"
    unused, both = report["unused"], report["in_both_splits"]
    doubts = [f"{name} has no image" for name, s in report["splits"].items() if not s["good_pairs"]]
    if images := unused.get("images"):
        doubts.append(f"{count(images, 'image')} {'is' if images == 1 else 'are'} left out")
    if either := unused.get("either"):
        what = "an image that is" if either == 1 else "images that are"
        doubts.append(f"{count(either, 'file')} may be {what} left out")
    if both:
        doubts.append(f"{count(both, 'image')} {'is' if both == 1 else 'are'} in both splits")
    if missing:
        doubts.append(f"no training mask has {name_classes(missing)}")
    if not doubts:
        return "training would work; no problems found"
    line = f"training would work, but {'; '.join(doubts)}"
    # A description lists every label, so the options below do not apply to it.
    if not missing or report["described"]:
        return line
    occurring = len(classes) - len(missing)
    if occurring == 1 and classes[0]["label"] == 1:
        line += "; use --no-ignore-background to make label 0 a class"
    elif occurring > 1 and all(entry["photos"] for entry in classes[:occurring]):
        line += f"; use --num-classes {occurring} if there are no other classes"
    return line


def count(number: int, noun: str) -> str:
    """Return a number with its noun, such as "2 images".

    Args:
        number: The number.
        noun: The noun in the singular.
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _first_of_each_kind(findings: list[dict[str, str]]) -> Iterator[str]:
    """Yield the first problems of each kind; a kind's problems differ in paths and numbers."""
    kinds: dict[str, list[dict[str, str]]] = {}
    for finding in findings:
        kind = re.sub(r"\S*/\S*|\d[\d.,]*", "", finding["reason"])
        kinds.setdefault(kind, []).append(finding)
    for alike in kinds.values():
        yield from (f"  {f['path']}: {f['reason']}" for f in alike[:SHOWN])
        if len(alike) > SHOWN:
            yield f"  … and {len(alike) - SHOWN:,} more like these; --json lists all"


def _table(title: str, splits: dict[str, Any], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table with one column per split."""
    align = ("left", *("right" for _ in splits))
    rows = [(title[:TITLE], *cells) for title, *cells in rows]
    table = tabulate(rows, (title, *splits), "plain", disable_numparse=True, colalign=align)
    return table.splitlines()


def _size_table(splits: dict[str, Any]) -> list[str]:
    rows = [
        (title, *(cell.format(**split, **split["size"]) for split in splits.values()))
        for title, cell in SIZE_ROWS.items()
    ]
    return _table("", splits, rows)


def _class_table(splits: dict[str, Any]) -> list[str]:
    """Return a table of class shares, without the middle rows if there are over 20 classes."""
    by_split = [split["classes"] for split in splits.values()]
    rows: list[tuple[str, ...]] = [
        (
            f"label {entries[0]['label']} ({entries[0]['name']})",
            *(f"{entry['share']:.3%}" for entry in entries),
        )
        for entries in sorted(zip(*by_split), key=lambda entries: -entries[0]["share"])
    ]
    if len(rows) > 20:
        rows[10:-5] = [(f"… {len(rows) - 15} more; --json lists all", *("" for _ in splits))]
    lines = _table("class, share of labelled pixels", splits, rows)
    for name, split in splits.items():
        never = [entry["name"] for entry in split["classes"] if not entry["photos"]]
        lines.append(f"never in {name}: {', '.join(never) or 'none, every class occurs'}")
    return lines
