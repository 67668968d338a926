"""Small data set descriptions, trees of empty files, and errors of an S3 client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from dataset.description import Description, parse_description

CLASSES = {"classes": {"road": [1], "sky": [2]}}
FOLDERS = {split: {"images": f"img/{split}", "masks": f"seg/{split}"} for split in ("train", "val")}


def describe(**keys: Any) -> Description:
    return parse_description({**FOLDERS, **CLASSES, **keys})


def tree(root: Path, files: list[str]) -> None:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def client_error(code: str) -> Exception:
    return ClientError({"Error": {"Code": code, "Message": "not found!"}}, "HeadObject")
