"""Tests of segmentation/metrics.py."""

import copy
import warnings

import composer.metrics
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from segmentation import views
from segmentation.metrics import (
    CrossEntropy,
    MIoU,
    accuracy_per_class,
    confused_pairs,
    confusion_matrix,
    confusion_matrix_of_predictions,
    iou_per_class,
    mean_accuracy,
    mean_iou,
    pixel_accuracy,
    score_batch,
)

CLASSES = 12


@pytest.fixture
def batches():
    """Return three batches of stride-4 logits and targets, with ignored pixels and absent classes.

    Class 3 occurs only in predictions, class 5 only in targets, and class 7 nowhere.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(3):
        target = torch.randint(0, CLASSES, (2, 32, 40), generator=generator)
        target[(target == 3) | (target == 7)] = 0
        target[torch.rand(target.shape, generator=generator) < 0.2] = -1
        logits = torch.randn(2, CLASSES, 8, 10, generator=generator)
        logits[:, [5, 7]] -= 100
        pairs.append((logits, target))
    return pairs


def upsample(logits, target):
    return F.interpolate(logits.float(), target.shape[1:], mode="bilinear", align_corners=False)


def test_miou_matches_composer(batches):
    ours, theirs = MIoU(CLASSES), composer.metrics.MIoU(CLASSES, ignore_index=-1)
    for logits, target in batches:
        ours.update(score_batch(logits, target))
        theirs.update(upsample(logits, target), target)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), abs=1e-9)
    assert iou_per_class(ours.matrix)[3] == 0  # a class that is only predicted counts in the mean
    assert iou_per_class(ours.matrix)[7].isnan()  # a class that does not occur is left out


def test_miou_matches_mmsegmentation(batches):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mmseg.core.evaluation import mean_iou as mmseg_mean_iou

    predictions, targets, matrix = [], [], 0
    for logits, target in batches:
        predictions += list(upsample(logits, target).argmax(1).numpy())
        targets += list(target.numpy())
        matrix += confusion_matrix(logits, target, CLASSES)
    theirs = mmseg_mean_iou(predictions, targets, CLASSES, ignore_index=-1)
    close = dict(rtol=0, atol=1e-9, equal_nan=True)
    np.testing.assert_allclose(iou_per_class(matrix), theirs["IoU"], **close)
    np.testing.assert_allclose(mean_iou(matrix), np.nanmean(theirs["IoU"]), **close)
    np.testing.assert_allclose(accuracy_per_class(matrix), theirs["Acc"], **close)
    np.testing.assert_allclose(mean_accuracy(matrix), np.nanmean(theirs["Acc"]), **close)
    np.testing.assert_allclose(pixel_accuracy(matrix), theirs["aAcc"], **close)


def test_confusion_matrix_matches_values_computed_by_hand():
    target = torch.tensor([[[0, 0, 1, -1]]])
    prediction = torch.tensor([[[0, 1, 1, 1]]])
    matrix = confusion_matrix_of_predictions(prediction, target, 3)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert iou_per_class(matrix)[:2].tolist() == [0.5, 0.5]
    assert mean_iou(matrix) == 0.5
    assert accuracy_per_class(matrix)[:2].tolist() == [0.5, 1]
    assert mean_accuracy(matrix) == 0.75
    assert pixel_accuracy(matrix) == pytest.approx(2 / 3)


def test_metrics_without_labelled_pixels_are_nan():
    logits, target = torch.randn(1, 3, 4, 4), torch.full((1, 8, 8), -1)
    miou, cross_entropy = MIoU(3), CrossEntropy()
    for metric in (miou, cross_entropy):
        metric.update(score_batch(logits, target))
    assert miou.matrix.sum() == 0
    assert miou.compute().isnan() and cross_entropy.compute().isnan()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_metrics_accept_narrow_dtypes_and_an_ignore_index(batches, dtype):
    logits, target = batches[0]
    expected = confusion_matrix(logits, target, CLASSES)
    narrow = torch.where(target < 0, 99, target).to(dtype)
    assert torch.equal(confusion_matrix(logits, narrow, CLASSES, ignore_index=99), expected)
    # Labels beyond the last class are ignored too, because transforms mark padding with 255.
    outside = torch.where(target < 0, 255, target)
    assert torch.equal(confusion_matrix(logits, outside, CLASSES), expected)
    wide, thin = score_batch(logits, target), score_batch(logits, narrow, ignore_index=99)
    assert wide.cross_entropy == thin.cross_entropy and torch.equal(wide.matrix, thin.matrix)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(32, 40), (37, 51), (8, 10), (5, 7)])
def test_predictions_match_upsampled_fp32_logits(monkeypatch, layout, dtype, size):
    """The result depends neither on the upsampling ratio nor on the rows upsampled at once."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, CLASSES, 8, 10, generator=generator).to(dtype)
    target = torch.randint(0, CLASSES, (2, *size), generator=generator)
    prediction = upsample(logits, target).argmax(1)
    expected = confusion_matrix_of_predictions(prediction, target, CLASSES)
    for rows in (1, 5, 1000):
        monkeypatch.setattr(views, "CPU_ROWS", rows)
        matrix = confusion_matrix(logits.to(memory_format=layout), target, CLASSES)
        assert torch.equal(matrix, expected)


def test_lowest_class_index_is_predicted_for_equal_logits():
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    matrix = confusion_matrix(torch.zeros(1, CLASSES, 2, 2), target, CLASSES)
    assert matrix[0, 0] == 64


@pytest.mark.parametrize("rows", [1, 8, 1000])
def test_cross_entropy_is_the_mean_over_all_pixels(monkeypatch, batches, rows):
    monkeypatch.setattr(views, "CPU_ROWS", rows)
    batches[0][1][0] = -1  # the batches have unequal numbers of labels
    metric = CrossEntropy()
    for logits, target in batches:
        metric.update(score_batch(logits, target))
    logits = torch.cat([upsample(*batch) for batch in batches]).double()
    target = torch.cat([target for _, target in batches])
    expected = F.cross_entropy(logits, target, ignore_index=-1)
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-6)


def test_autocast_does_not_change_metrics(batches):
    plain, autocast = (MIoU(CLASSES), CrossEntropy()), (MIoU(CLASSES), CrossEntropy())
    for batch in batches:
        for metric in plain:
            metric.update(score_batch(*batch))
        with torch.autocast("cpu", torch.bfloat16):
            for metric in autocast:
                metric.update(score_batch(*batch))
    assert torch.equal(plain[0].matrix, autocast[0].matrix)
    assert plain[1].compute() == autocast[1].compute()


def largest_allocation(function):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    return max(event.cpu_memory_usage for event in profiler.events())


@pytest.mark.parametrize(
    "function",
    [score_batch, lambda logits, target: confusion_matrix(logits, target, 150)],
    ids=["score", "confusion matrix"],
)
def test_metrics_allocate_no_tensor_of_the_upsampled_size(function):
    logits, target = torch.randn(2, 150, 32, 32), torch.zeros(2, 256, 256, dtype=torch.int64)
    full = upsample(logits, target)
    assert largest_allocation(lambda: function(logits, target)) < full.nbytes / 4
    # The profiler would see a tensor of the upsampled size.
    assert largest_allocation(lambda: upsample(logits, target)) >= full.nbytes


def test_metrics_are_summed_over_ranks_once(batches):
    """The simulated second rank counts twice as many pixels as the first."""
    metric = MIoU(CLASSES)
    gathered = []

    def gather(tensor, group):
        gathered.append(tensor)
        return [tensor, 2 * tensor]

    metric.dist_sync_fn = gather
    metric.distributed_available_fn = lambda: True
    for batch in batches:
        metric.update(score_batch(*batch))
    assert not gathered and metric.total_matrix is None
    value = metric.compute()
    assert len(gathered) == 1
    assert torch.equal(metric.total_matrix, 3 * metric.matrix)
    assert metric.matrix.sum() == sum((target >= 0).sum() for _, target in batches)
    assert value == 100 * mean_iou(metric.total_matrix)


def test_total_confusion_matrix_is_from_the_last_evaluation(batches):
    metric = copy.deepcopy(MIoU(CLASSES))  # Composer copies metrics like this
    metric.update(score_batch(*batches[0]))
    first = metric.compute()
    total = metric.total_matrix
    metric.update(score_batch(*batches[1]))
    # Later batches do not change the total matrix.
    assert torch.equal(total, confusion_matrix(*batches[0], CLASSES))
    metric.reset()
    metric.update(score_batch(*batches[1]))
    assert metric.compute() != first  # the value is not cached
    assert torch.equal(metric.total_matrix, confusion_matrix(*batches[1], CLASSES))


def test_confused_class_pairs_match_values_computed_by_hand():
    matrix = torch.tensor([[8, 2, 0], [5, 5, 0], [0, 1, 0]])
    assert confused_pairs(matrix, 2) == [(1, 0, 5, 50.0), (0, 1, 2, 20.0)]
    assert confused_pairs(matrix, 9)[2:] == [(2, 1, 1, 100.0)]
    assert confused_pairs(torch.eye(3, dtype=torch.int64), 5) == []
