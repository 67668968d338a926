"""Tests of extras/preparation/check_report.py; test_check_command.py tests complete reports."""

from typing import Any

import pytest

from extras.preparation.check_report import SHOWN, as_text, count


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [(1, "image", "1 image"), (0, "image", "0 images"), (12345, "file", "12,345 files")],
)
def test_count_is_formatted_with_its_noun(number: int, noun: str, expected: str) -> None:
    assert count(number, noun) == expected


def test_text_report_shortens_a_list_of_similar_findings() -> None:
    findings = [{"path": f"{i}.png", "reason": "label 7 is unknown"} for i in range(SHOWN + 3)]
    report: dict[str, Any] = {
        "path": "set",
        "format": "folders",
        "num_classes": 3,
        "splits": {"train": {"good_pairs": 0}},
        "loader": None,
        "oddities": [],
        "problems": findings,
        "unused": {},
    }
    lines = as_text(report).splitlines()
    assert f"PROBLEMS ({SHOWN + 3})" in lines
    assert sum("label 7 is unknown" in line for line in lines) == SHOWN
    assert any("3 more like these" in line for line in lines)
    assert lines[-1] == "training would fail; fix the problems above"
