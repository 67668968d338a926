"""Tests of training/report.py."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from composer.utils import dist
from torch import nn

from model import ComposerDeepLabV3
from segmentation.classes import load_classes
from tests.support.run_report import Page, run  # noqa: F401
from training.report import Report, _table
from transforms import DeviceTransform


def test_html_in_a_class_name_is_escaped() -> None:
    name = "<script>alert(1)</script>&"
    classes = load_classes([name, "b"], 2)
    text = _table((["class", "IoU", "pixels"], [[name, 1.5, 2], ["b", None, 0]]), classes)
    page = Page(text)
    assert "script" not in page.texts
    assert page.rows[1:] == [[name, "1.50", "2"], ["b", "-", "0"]]


@pytest.mark.parametrize(
    ("rank", "ranks", "expected"),
    [
        pytest.param(0, 1, [("3.jpg", "0.00"), ("1.jpg", "25.00")], id="one rank"),
        pytest.param(1, 2, [("3.jpg", "0.00"), ("1.jpg", "25.00")], id="second of two ranks"),
    ],
)
def test_images_with_the_lowest_scores_are_shown(
    rank: int,
    ranks: int,
    expected: list[tuple[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Evaluate four 64 x 64 predictions: correct, half correct, unlabelled and wrong."""
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(dist, "get_global_rank", lambda: rank)
    monkeypatch.setattr(dist, "all_gather_object", lambda part: [part])
    targets = torch.zeros(4, 64, 64, dtype=torch.uint8)
    logits = nn.functional.one_hot(targets.long(), 3).permute(0, 3, 1, 2).float()
    logits[1, :, :32] = logits[1, :, :32].roll(1, 0)  # The upper half is predicted as class 1.
    targets[2], targets[3] = 254, 1
    images = torch.arange(40, 200, 40, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 64, 64)

    transform, samples = DeviceTransform(), [SimpleNamespace(image_path=f"{i}.jpg") for i in "0123"]
    transform.first = 0
    state: Any = SimpleNamespace(
        model=ComposerDeepLabV3(nn.Identity(), 3),
        is_model_ddp=False,
        dataloader_label="eval",
        dataloader=SimpleNamespace(dataset=type("Data", (list,), {"samples": samples})(samples)),
        evaluators=[
            SimpleNamespace(
                label="eval", dataloader=SimpleNamespace(microbatch_transforms=transform)
            )
        ],
        eval_metrics={},
    )
    classes = load_classes(["road", "car", "tree"], 3)
    config = cast(Any, SimpleNamespace(pictures=2))
    report = Report(config, classes, str(tmp_path), cast(Any, None), None)
    monkeypatch.setattr(report, "_write", lambda state: None)
    report.eval_start(state, cast(Any, None))
    # The sampler repeats image 0 to fill up a rank, and the repeat must not count.
    own = [*range(rank, 4, ranks), 0]
    for part in (own[:1], own[1:]):
        state.batch, state.outputs = transform((images[part], targets[part])), logits[part]
        report.eval_after_forward(state, cast(Any, None))
    report.eval_end(state, cast(Any, None))
    page = Page(report._worst)
    captions = re.findall(r"(\S+): mIoU (\S+)%", "\n".join(page.texts["figcaption"]))
    assert captions == expected
    # Each sheet begins with the image itself.
    grey = [np.array(image.convert("RGB"))[100, 100].tolist() for image in page.images]
    assert np.abs(np.array(grey) - [[160], [80]]).max() <= 3
