"""Tests of command_lines.py."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

import command_lines
from command_lines import available_cores, share_cores, start

COMMANDS = ["main", "data", "evaluate", "predict", "export"]
COMMANDS += ["convert_ade20k", "convert_dataset", "download_ade20k"]


@pytest.mark.parametrize(
    ("environment", "cores", "all_cores", "expected"),
    [
        pytest.param({}, 8, 8, {"OMP_WAIT_POLICY": "PASSIVE"}, id="single process"),
        pytest.param({}, 2, 8, {"OMP_NUM_THREADS": "2"}, id="container or taskset"),
        pytest.param({"LOCAL_WORLD_SIZE": "4"}, 8, 8, {"OMP_NUM_THREADS": "2"}, id="four ranks"),
        pytest.param(
            {"LOCAL_WORLD_SIZE": "4"}, 2, 2, {"OMP_NUM_THREADS": "1"}, id="more ranks than cores"
        ),
        pytest.param(
            {"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"},
            8,
            8,
            {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"},
            id="user settings",
        ),
    ],
)
def test_cores_are_divided_among_ranks(
    environment: dict[str, str],
    cores: int,
    all_cores: int,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command_lines, "available_cores", lambda: cores)
    monkeypatch.setattr("os.cpu_count", lambda: all_cores)
    actual = dict(environment)
    share_cores(actual)
    assert actual == {"OMP_WAIT_POLICY": "PASSIVE"} | environment | expected


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        pytest.param("max 100000", 4, id="no quota"),
        pytest.param("200000 100000", 2, id="two cores"),
        pytest.param("150000 100000", 2, id="one and a half cores"),
        pytest.param("10000 100000", 1, id="a tenth of a core"),
        pytest.param("900000 100000", 4, id="more cores than exist"),
        pytest.param("", 4, id="empty file"),
        pytest.param(None, 4, id="no file"),
    ],
)
def test_available_cores_respect_the_cgroup_cpu_quota(
    quota: str | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)), raising=False)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    assert available_cores(tmp_path / "cpu.max") == cores


def test_commands_parse_arguments_before_setting_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "--flag"])
    monkeypatch.setattr(command_lines, "share_cores", lambda _: pytest.fail("not parsed yet"))

    def parse(arguments: list[str]) -> None:
        assert arguments == ["--flag"]
        raise SystemExit(0)

    with pytest.raises(SystemExit):
        start(parse)


def test_commands_silence_the_cuda_toolkit_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("torch.utils.cpp_extension")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    monkeypatch.setattr(command_lines, "share_cores", lambda _: None)
    start()
    assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)


@pytest.mark.parametrize(
    ("kind", "accepted"),
    [("onnx", True), ("web", True), ("torchscript", False), ("safetensors", False), ("hub", False)],
)
def test_half_option_is_accepted_only_for_onnx_and_web(
    kind: str, accepted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["model.pt", "--to", kind, "--half"]
    if accepted:
        assert command_lines.parse_export(arguments).half
        return
    with pytest.raises(SystemExit):
        command_lines.parse_export(arguments)
    assert "--half works only with --to onnx and --to web" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        pytest.param("evaluate", ["--worst", "2"], "--worst N and --out FOLDER", id="worst"),
        pytest.param("evaluate", ["--out", "x"], "--worst N and --out FOLDER", id="out"),
        pytest.param(
            "evaluate",
            ["--per-image", "x", "--protocol", "square"],
            "work only with --protocol paper",
            id="scores of images in the square protocol",
        ),
        pytest.param("evaluate", ["--confusion", "x.jpg"], "x.jpg must end in .png", id="JPEG"),
        pytest.param("convert_dataset", ["--val", "1.5"], "--val: 1.5 must be a share", id="val"),
        pytest.param(
            "convert_dataset", ["--ignore", "a"], "a must be values of masks", id="ignore"
        ),
        pytest.param(
            "convert_dataset", ["--background", ""], "the value is empty", id="background"
        ),
        pytest.param("convert_dataset", [], "--images: the option is missing", id="images"),
    ],
)
def test_invalid_options_give_an_error(
    command: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["source", *(["--out", "x"] if command == "convert_dataset" else []), *options]
    with pytest.raises(SystemExit):
        getattr(command_lines, f"parse_{command}")(arguments)
    assert message in capsys.readouterr().err
