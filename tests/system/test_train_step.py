"""benchmarks/train_step.py measures memory in a separate process."""

from __future__ import annotations

from benchmarks import train_step


def test_train_step_benchmark_measures_memory_of_a_new_process(
    synthetic: str, small_network: None
) -> None:
    text = f"--path {synthetic} --classes 12 --size 32 --batch 2 --workers 0 --arch resnet50"
    args = train_step.arguments(text.split())
    # The new process holds fp32 weights, gradients and momentum of the full network.
    assert train_step.resident_bytes(args, "ours", "none") > 3 * 4 * 25e6
