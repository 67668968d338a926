"""A wrapper for mmsegmentation's networks that adds their auxiliary outputs and losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ModelError
from networks.base import Network, cross_entropy

MMSEG_IGNORED = 255  # Label that mmsegmentation's losses ignore.

Loss = Callable[[Any, Tensor, int], Tensor]


class MMSegNetwork(Network):
    """An mmsegmentation segmentor with the auxiliary outputs of its heads.

    For auxiliary heads with a plain cross entropy, this project computes the loss, as it does for
    the main head. The heads compute all other losses themselves.
    """

    def __init__(self, network: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(network, *args, **options)
        segmentor: Any = network
        # The heads are already submodules of the segmentor. Store them in tuples, so that they are
        # not registered twice.
        self._heads = heads = _as_tuple(segmentor.decode_head)
        self._auxiliary = _as_tuple(getattr(segmentor, "auxiliary_head", None))
        self._refines = type(heads[-1]).__name__ == "PointHead"
        main = heads[0] if self._refines else heads[-1]
        first = [loss for head in heads if head is not main for loss in _losses(head)]
        rest = [loss for head in self._auxiliary for loss in _losses(head)]
        self._losses: list[Loss] = [*first, *_losses(main)[1:], *rest]

    def outputs(self, image: Tensor) -> tuple[Any, ...]:
        """Return the logits of padded images and, in training, the auxiliary outputs."""
        segmentor: Any = self.network
        features = segmentor.extract_feat(image)
        first, *others = self._heads
        if not self.training:
            logits = first.forward_test(features, None, segmentor.test_cfg)
            for head in others:
                logits = head.forward_test(features, logits, None, segmentor.test_cfg)
            return (logits,)
        main, *more = _parts(first(features))
        before: list[Any] = []
        for head in others:
            if self._refines:
                before.append(_points(head, features, main, segmentor.train_cfg))
            else:
                before.append(main)
                main = head(features, main)
        rest = [part for head in self._auxiliary for part in _parts(head(features))]
        return (main, *before, *more, *rest)

    def losses_of(self, outputs: Sequence[Any], target: Tensor, ignore_index: int) -> list[Tensor]:
        """Return one weighted loss for each auxiliary output."""
        return [
            loss(output, target, ignore_index)
            for loss, output in zip(self._losses, outputs, strict=True)
        ]


def _as_tuple(heads: nn.Module | None) -> tuple[Any, ...]:
    """Return one or several heads as a tuple; for None, return an empty tuple."""
    if heads is None:
        return ()
    return tuple(heads) if isinstance(heads, nn.ModuleList) else (heads,)


def _parts(outputs: Any) -> list[Any]:
    """Return a head's training outputs, logits first."""
    # K-Net returns a list with the output of each stage. The result is the last stage's output.
    if isinstance(outputs, list):
        return [outputs[-1], *outputs[:-1]]
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def _losses(head: Any) -> list[Loss]:
    """Return the loss functions for a head's outputs, in the order of `_parts`."""
    kind = type(head).__name__
    if kind == "PointHead":
        return [_point_loss(head)]
    if kind == "IterativeDecodeHead":
        return _losses(head.kernel_generate_head) * (head.num_stages + 1)
    if kind == "STDCHead" or not _is_plain(head):
        return [_own_loss(head)]
    weight = getattr(head.loss_decode, "loss_weight", 1.0)

    def plain(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        return weight * cross_entropy(logits, target, ignore_index)

    if kind == "DAHead":
        return [plain] * 3
    if kind == "EncHead" and head.use_se_loss:
        return [plain, _encoding_loss(head)]
    return [plain]


def _is_plain(head: Any) -> bool:
    loss = head.loss_decode
    plain = type(loss).__name__ == "CrossEntropyLoss" and not (loss.use_sigmoid or loss.use_mask)
    return plain and head.sampler is None


def _own_loss(head: Any) -> Loss:
    """Return a head's own implementation of its loss."""
    if type(head).__name__ in ("DAHead", "EncHead"):
        raise ModelError(
            f"{type(head).__name__}: this head works only with plain cross entropy; change its "
            "loss_decode"
        )

    def loss(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        labels = target.long().masked_fill(target == ignore_index, MMSEG_IGNORED)[:, None]
        with torch.autocast(logits.device.type, enabled=False):
            losses = head.losses(logits.float(), labels)
        return torch.stack([part.mean() for key, part in losses.items() if "loss" in key]).sum()

    return loss


def _encoding_loss(head: Any) -> Loss:
    """Return EncNet's loss for predicting which classes are present in an image."""

    def loss(scores: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        classes = torch.arange(head.num_classes, device=target.device)
        present = [(labels.unique() == classes[:, None]).any(1) for labels in target]
        with torch.autocast(scores.device.type, enabled=False):
            return head.loss_se_decode(scores.float(), torch.stack(present).float())

    return loss


def _points(head: Any, features: Any, logits: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Return PointRend's logits at sampled points, and the points' positions (N, P, 2) in 0..1."""
    from mmseg.models.decode_heads.point_head import calculate_uncertainty

    selected = head._transform_inputs(features)
    with torch.no_grad():
        points = head.get_points_train(logits, calculate_uncertainty, cfg=config)
    fine = head._get_fine_grained_point_feats(selected, points)
    return head(fine, head._get_coarse_point_feats(logits, points)), points


def _point_loss(head: Any) -> Loss:
    weight = getattr(head.loss_decode, "loss_weight", 1.0)

    def loss(output: tuple[Tensor, Tensor], target: Tensor, ignore_index: int) -> Tensor:
        from mmcv.ops import point_sample

        logits, points = output
        labels = point_sample(
            target[:, None].float(), points, mode="nearest", align_corners=head.align_corners
        )
        labels = labels[:, 0].long()
        return weight * F.cross_entropy(logits.float(), labels, ignore_index=ignore_index)

    return loss
