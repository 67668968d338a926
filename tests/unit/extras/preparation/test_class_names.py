"""Tests of extras/preparation/class_names.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from extras.preparation.suggest import suggest
from tests.support.suggest import COLORED, N, described, lay_out, save

BY_VALUE = "Pixel Value, Class\n0, sky\n1, on\n2, 007\n"
CVAT = "# label:color_rgb:parts:actions\nsky:0,0,0::\non:128,64,128::\n007:0,0,142::\n"
BY_COLOR = "name,r,g,b\nsky,0,0,0\non,128,64,128\n007,0,0,142\n"
BOTH = "id\tname\tred\tgreen\tblue\n9\tsky\t0\t0\t0\n8\ton\t128\t64\t128\n7\t007\t0\t0\t142\n"
TABLES = [
    pytest.param("_classes.csv", BY_VALUE, "grey", id="Roboflow"),
    pytest.param("labelmap.txt", CVAT, "colours", id="CVAT, colours"),
    pytest.param("labelmap.txt", CVAT, "palette", id="CVAT, palette"),
    pytest.param("class_dict.csv", BY_COLOR, "colours", id="class_dict, colours"),
    pytest.param("class_dict.csv", BY_COLOR, "palette", id="class_dict, palette"),
    pytest.param("colors.tsv", BOTH, "colours", id="numbers and colours"),
    pytest.param("colors.tsv", BOTH, "palette", id="numbers and colours, palette"),
    pytest.param("names.txt", "id;name\n0;sky\n1;on\n2;007\n", "grey", id="semicolons"),
]


@pytest.mark.parametrize(("file", "table", "mode"), TABLES)
def test_class_names_are_read_from_class_tables(
    file: str, table: str, mode: str, tmp_path: Path
) -> None:
    lay_out(tmp_path, [("i/{}.jpg", "m/{}.png", N)])
    for path in (tmp_path / "m").iterdir():
        mask = np.array(Image.open(path))
        if mode == "palette":
            save(path, mask, [part for color in COLORED for part in color])
        elif mode == "colours":
            save(path, np.array(COLORED, np.uint8)[mask])
    (tmp_path / "m" / file).write_text(table)
    text = suggest(str(tmp_path), 1).text
    description, _ = described(tmp_path, text)
    assert {c.name for c in description.classes} == {"sky", "on", "007"}
    assert f"# The names come from m/{file}." in text and "To do" not in text


def test_colours_of_the_same_class_name_become_one_class(tmp_path: Path) -> None:
    lay_out(tmp_path, [("i/{}.jpg", "m/{}.png", N)])
    for path in (tmp_path / "m").iterdir():
        save(path, np.array(COLORED, np.uint8)[np.array(Image.open(path))])
    (tmp_path / "class_dict.csv").write_text(
        'name,r,g,b\n"road, wet",0,0,0\ntree,0,0,142\n"road, wet",128,64,128\npond,1,2,3\n'
    )
    text = suggest(str(tmp_path), 1).text
    raw = yaml.safe_load(text)
    assert raw["classes"] == {
        "road, wet": {"labels": [[0, 0, 0], [128, 64, 128]]},
        "tree": {"labels": [[0, 0, 142]]},
    }
    assert "# No mask has pond." in text


def test_void_class_in_a_class_table_is_ignored(tmp_path: Path) -> None:
    lay_out(tmp_path, [("i/{}.jpg", "m/{}.png", N)])
    (tmp_path / "_classes.csv").write_text("Pixel Value, Class\n0, Void\n1, road\n2, tree\n")
    raw = yaml.safe_load(suggest(str(tmp_path), 1).text)
    assert list(raw["classes"]) == ["road", "tree"] and raw["ignore"] == [0]
