"""Package lists, install.sh, the Makefile and the Docker image are consistent and work.

Fake programs replace those that install packages. CI runs the real installation before these tests.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT
from training.schema import LOGGERS

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK: dict[str, Any] = tomllib.loads((ROOT / "uv.lock").read_text())
README = (ROOT / "README.md").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
DEFAULT_TORCH = PROJECT["tool"]["uv"]["default-groups"]


def normal(requirements: list[str]) -> set[str]:
    """Return requirements with normalised names and without environment markers."""
    result = set()
    for line in requirements:
        requirement = Requirement(line)
        requirement.name = canonicalize_name(requirement.name)
        requirement.marker = None
        result.add(str(requirement))
    return result


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


MACHINES = [
    {"python_version": version, "python_full_version": f"{version}.0", "platform_machine": machine}
    for version in ("3.11", "3.12", "3.13")
    for machine in ("x86_64", "aarch64")
]


def installed(lines: list[str], machine: dict[str, str]) -> set[str]:
    """Return the packages and versions that the requirements install on a Linux machine."""
    environment = default_environment() | {"sys_platform": "linux"} | machine
    requirements = [Requirement(line) for line in lines]
    return {
        f"{canonicalize_name(r.name)}{r.specifier}"
        for r in requirements
        if r.marker is None or r.marker.evaluate({k: str(v) for k, v in environment.items()})
    }


def test_requirements_txt_equals_uv_lock_without_torch() -> None:
    text = (ROOT / "requirements.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("#", "--find-links"))]
    command = "uv export -q --frozen --no-hashes --no-annotate --no-header"
    assert f"{command} --prune torch --prune torchvision" in MAKEFILE
    uv = str(Path(sys.executable).with_name("uv"))
    arguments = [uv, *command.split()[1:], "--prune", "torch", "--prune", "torchvision"]
    process = subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, text=True)
    for machine in MACHINES:
        packages = installed(lines, machine)
        assert packages == installed(process.stdout.splitlines(), machine), "make lock writes it"
        package_names = {re.split("[=<>]", package)[0] for package in packages}
        assert not {
            n for n in package_names if re.match(r"torch$|torchvision|triton|nvidia|cuda", n)
        }
        wanted = installed(PROJECT["project"]["dependencies"], machine)
        assert packages >= wanted - {"torch", "torchvision"}
        assert (
            "addict" in package_names
        )  # a dependency of mmcv-full, which pip --no-deps would skip


def test_files_of_mmcv_wheel_match_their_sha256_digests() -> None:
    (locked,) = [p for p in LOCK["package"] if p["name"] == "mmcv-full"]
    (wheel,) = locked["wheels"]
    path = ROOT / "wheels" / wheel["path"]
    readme = (ROOT / "wheels/README.md").read_text()
    assert f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`" in readme
    assert path.name == "mmcv_full-1.7.2-py2.py3-none-any.whl"
    with zipfile.ZipFile(path) as content:
        names = content.namelist()
        # Every file has the SHA-256 digest in the wheel's RECORD.
        record = content.read("mmcv_full-1.7.2.dist-info/RECORD").decode().splitlines()
        for line in record:
            name, digest, _ = line.rsplit(",", 2)
            if digest:
                digest_bytes = hashlib.sha256(content.read(name)).digest()
                assert digest == "sha256=" + base64.urlsafe_b64encode(digest_bytes).decode().rstrip(
                    "="
                )
    assert len(record) == len(names) > 300
    assert not [name for name in names if name.endswith((".so", ".pyd", ".dylib"))]
    assert "--find-links wheels" in (ROOT / "requirements.txt").read_text().splitlines()


def test_uv_lock_contains_no_path_of_this_machine() -> None:
    """uv writes the path of wheels/ on this machine, which `make lock` replaces by a fixed path."""
    assert re.findall(r"file://[^\"]*", (ROOT / "uv.lock").read_text()) == ["file:///wheels"]


def test_uv_lock_matches_pyproject_toml() -> None:
    (project_package,) = [
        package for package in LOCK["package"] if package["name"] == PROJECT["project"]["name"]
    ]

    def normalised(entries: list[dict[str, Any]]) -> set[str]:
        extras = [",".join(e.get("extras", [])) for e in entries]
        texts = [
            f"{e['name']}[{extra}]{e.get('specifier', '')}"
            if extra
            else e["name"] + e.get("specifier", "")
            for e, extra in zip(entries, extras, strict=True)
        ]
        return normal(texts)

    groups = PROJECT["dependency-groups"]

    def flat(group: list[Any]) -> list[str]:
        return [
            line
            for entry in group
            for line in (
                flat(groups[entry["include-group"]]) if isinstance(entry, dict) else [entry]
            )
        ]

    assert normalised(project_package["metadata"]["requires-dist"]) == normal(
        PROJECT["project"]["dependencies"]
    )
    locked = {
        name: normalised(entries)
        for name, entries in project_package["metadata"]["requires-dev"].items()
    }
    assert locked == {canonicalize_name(name): normal(flat(g)) for name, g in groups.items()}
    assert LOCK["requires-python"].replace(" ", "") == PROJECT["project"]["requires-python"]


@pytest.mark.parametrize("name", ["mosaicml", "mosaicml-streaming", "mmcv-full"])
def test_overridden_metadata_keeps_all_package_dependencies(name: str) -> None:
    """pyproject.toml relaxes their version bounds; an upgraded package may need a new list."""
    (ours,) = [e for e in PROJECT["tool"]["uv"]["dependency-metadata"] if e["name"] == name]
    assert importlib.metadata.version(name) == ours["version"]
    wanted = {
        canonicalize_name(requirement.name)
        for requirement in map(Requirement, importlib.metadata.requires(name) or [])
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }
    wanted -= {"opencv-python"}  # replaced by opencv-python-headless
    assert names(ours["requires-dist"]) == wanted


def test_every_logger_package_has_a_dependency_group() -> None:
    missing = {name for name, package in LOGGERS.items() if package} - set(
        PROJECT["dependency-groups"]
    )
    assert not missing - {"progress_bar", "console", "file"}


TOOLS = (
    "awk",
    "bash",
    "cat",
    "chmod",
    "cp",
    "dirname",
    "env",
    "grep",
    "mkdir",
    "mktemp",
    "rm",
    "sleep",
    "sort",
    "tail",
    "touch",
)
# A fake Python that reports its path.
COMPATIBLE = '#!/bin/sh\necho "{path}"\n'
INCOMPATIBLE = "#!/bin/sh\nexit 1\n"
UV = """#!/bin/sh
echo "$UV_PROJECT_ENVIRONMENT uv $*" >>calls
case "$*" in
"cache dir") echo /cache; exit ${TOO_OLD:-0} ;;
"python install"*) exit ${NO_DOWNLOADS:-0} ;;
"python find"*) echo /brought/python3.13 ;;
sync*)
  case "$*" in *"${FAILING:-nothing}"*) echo "$FAILURE" >&2; exit 2 ;; esac
  bin=$UV_PROJECT_ENVIRONMENT/bin
  mkdir -p "$bin"
  printf '#!/bin/sh\\ncase "$*" in *mmcv*) exit 0;; esac; exit 1' >"$bin/python"
  chmod +x "$bin/python" ;;
esac
"""
# A fake Python that creates an environment whose pip installs a fake uv.
HOST = """#!/bin/sh
case "$*" in
*venv*) mkdir -p .uv/bin; cp "$0" .uv/bin/python ;;
*pip*) echo "pip $*" >>calls; cp uv-that-pip-brings .uv/bin/uv ;;
*) exit 1 ;;
esac
"""


class Machine:
    """A folder with the project's installation files, and a PATH with fake programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            location = shutil.which(tool)
            assert location, tool
            (self.bin / tool).symlink_to(location)
        for name in ("python3.13", "python3.12", "python3.11", "python3", "python"):
            self.program(name, INCOMPATIBLE)
        self.program("uv", UV)
        for name in ("install.sh", "pyproject.toml", "uv.lock", "Makefile"):
            shutil.copy(ROOT / name, folder / name)

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text.format(path=f"/real/{name}") if "{path}" in text else text)
        path.chmod(0o755)

    def install(self, *groups: str, **environment: str) -> tuple[list[str], str, int]:
        """Run ./install.sh; return its output lines, its stderr and its exit status."""
        home = {"PATH": str(self.bin), "HOME": str(self.folder), "PYENV_ROOT": str(self.folder)}
        process = subprocess.run(
            ["bash", "install.sh", *groups],
            cwd=self.folder,
            env={**home, **environment},
            capture_output=True,
            text=True,
        )
        return process.stdout.splitlines(), process.stderr.strip(), process.returncode

    def calls(self) -> list[str]:
        """Return the recorded calls since the last query, without calls that install nothing."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line.strip() for line in lines if "cache dir" not in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_installation_prints_duration_of_each_step(machine: Machine) -> None:
    machine.program("python3.11", COMPATIBLE)
    lines, error, status = machine.install("wandb")
    assert (error, status) == ("", 0)
    steps = [re.fullmatch(r"(\w+),? .*\(.*\) \.\.\. \d+ s", line) for line in lines]
    assert [step and step[1] for step in steps] == ["Packages", "First"]
    assert machine.calls() == [
        ".venv uv sync --frozen --python /real/python3.11 --group wandb",
    ]
    # A second installation keeps the groups and the Python of the first.
    machine.program("python3.11", INCOMPATIBLE)
    machine.program("python3.12", COMPATIBLE)
    (folder := machine.folder / ".venv/bin/python").write_text(
        COMPATIBLE.format(path="/real/python3.11")
    )
    folder.chmod(0o755)
    _, error, status = machine.install("onnx")
    assert (error, status) == ("", 0)
    (call,) = machine.calls()
    assert call == ".venv uv sync --frozen --python /real/python3.11 --group onnx --group wandb"


UV_LOG = """Using CPython 3.13.0
Downloading torch (514.2MiB)
Downloading nvidia-cudnn-cu13 (1.5GiB)
Downloading brotli (512KiB)
 Downloaded torch
 Downloaded brotli
Prepared 3 packages in 19.28s
"""


@pytest.mark.parametrize(
    ("log", "text"),
    [
        pytest.param(UV_LOG, "514 of 2050 MB", id="two of three packages"),
        pytest.param("Downloading brotli (512KiB)\n", "", id="small packages"),
        pytest.param("Resolved 3 packages in 1ms\n", "", id="no download"),
    ],
)
def test_download_progress_shows_megabytes(tmp_path: Path, log: str, text: str) -> None:
    (tmp_path / "log").write_text(log)
    script = (ROOT / "install.sh").read_text()
    function = script[script.index("downloaded() {") :].partition("\n}\n")[0]
    command = f"log={tmp_path}/log\n{function}\n}}\ndownloaded"
    process = subprocess.run(["bash", "-euc", command], capture_output=True, text=True)
    assert (process.stdout, process.stderr) == (text, "")


def test_other_torch_version_gets_its_own_environment(machine: Machine) -> None:
    machine.program("python3.11", COMPATIBLE)
    _, error, status = machine.install(TORCH="2.7.0")
    assert (error, status) == ("", 0)
    (call,) = machine.calls()
    chosen = "--python /real/python3.11 --no-default-groups --group torch-2.7.0"
    assert call == f".venv-2.7.0 uv sync --frozen {chosen}"
    assert "torch-2.7.0" in PROJECT["dependency-groups"]


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        ("error: No space left on device (os error 28)", "the disk is full: .* take 8 GB"),
        (
            "error: Failed to fetch: `x`\n  cause: dns error",
            "a download failed; run the command again",
        ),
        ("error: something else", "error: something else\nerror: the lines above say why"),
    ],
)
def test_failed_installation_step_explains_the_error(
    machine: Machine, failure: str, line: str
) -> None:
    machine.program("python3.12", COMPATIBLE)
    lines, error, status = machine.install(FAILING="sync", FAILURE=failure)
    assert status == 1 and lines[-1].endswith("... failed")
    assert re.search(line, error), error
    assert error.splitlines()[-1].startswith("error: ")


def test_install_prefers_existing_python_or_downloads_one(machine: Machine) -> None:
    """install.sh uses a Python that the machine has; if it has none, uv downloads one."""
    refused = r"error: a download failed.*|error: the lines above say why"
    lines, error, status = machine.install(NO_DOWNLOADS="2")
    assert status == 1 and re.fullmatch(refused, error.splitlines()[-1])
    assert lines[-1].startswith("Python 3.13, because") and lines[-1].endswith("failed")
    assert machine.calls() == ["uv python install --no-bin 3.13"]

    lines, error, status = machine.install()
    assert (error, status) == ("", 0)
    assert machine.calls()[-1].endswith("--python /brought/python3.13")
    shutil.rmtree(machine.folder / ".venv")

    versions = machine.folder / "versions/3.12.1/bin"  # a Python of pyenv, whose shims may fail
    versions.mkdir(parents=True)
    (versions / "python").write_text(COMPATIBLE.format(path="/pyenv/3.12"))
    (versions / "python").chmod(0o755)
    machine.install()
    assert machine.calls()[-1].endswith("--python /pyenv/3.12")

    machine.program("python3.13", COMPATIBLE)
    shutil.rmtree(machine.folder / ".venv")
    machine.install()
    assert machine.calls()[-1].endswith("--python /real/python3.13")
    machine.program("python3", COMPATIBLE)  # the default Python is preferred, even if it is older
    shutil.rmtree(machine.folder / ".venv")
    machine.install()
    assert machine.calls()[-1].endswith("--python /real/python3")

    _, error, status = machine.install(PYTHON="python3.11")
    assert (error, status) == ("error: PYTHON=python3.11 is not a Python 3.11, 3.12 or 3.13", 1)


@pytest.mark.parametrize(
    "existing", [None, UV.replace("${TOO_OLD:-0}", "2")], ids=["no uv", "old uv"]
)
def test_missing_or_old_uv_is_installed_with_pip(machine: Machine, existing: str | None) -> None:
    (machine.bin / "uv").unlink()
    if existing:
        machine.program("uv", existing)
    machine.program("python3", HOST)
    machine.program("python3.12", COMPATIBLE)
    (machine.folder / "uv-that-pip-brings").write_text(UV)
    (machine.folder / "uv-that-pip-brings").chmod(0o755)
    lines, error, status = machine.install()
    assert (error, status) == ("", 0) and lines[0].startswith(
        "uv, which installs the rest (5 s) ... "
    )
    (pip,) = [call for call in machine.calls() if call.startswith("pip")]
    (pinned,) = [
        line for line in PROJECT["dependency-groups"]["dev"] if str(line).startswith("uv==")
    ]
    assert pip.endswith(pinned)
    lines, error, status = machine.install()
    assert (error, status) == ("", 0) and not lines[0].startswith("uv")
    assert not any("pip" in call for call in machine.calls())


def test_install_without_uv_or_pip_gives_one_line_error(machine: Machine) -> None:
    (machine.bin / "uv").unlink()
    _, error, status = machine.install()
    assert status == 1 and error.startswith("error: no Python here can install uv; install uv, or")


def test_install_sh_passes_shellcheck() -> None:
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    process = subprocess.run([shellcheck, ROOT / "install.sh"], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


RECORDER = '#!/bin/sh\necho "$VENV $TORCH $(basename $0) $*" >>calls\n'
PYTEST = "python -m pytest --dist=loadfile --no-loadscope-reorder --numprocesses=3"


def make(folder: Path, *arguments: str) -> list[str]:
    """Run make; return the programs that it calls, with their arguments."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("VENV", "TORCH")
    }
    environment = {
        k: v for k, v in environment.items() if not k.startswith("MAKE") and k != "MFLAGS"
    }
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    process = subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return calls.read_text().splitlines() if calls.exists() else []


def test_make_reinstalls_only_when_uv_lock_changes(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "uv.lock"):
        shutil.copy(ROOT / name, tmp_path)
    programs = [
        f"{venv}/bin/{name}"
        for venv in (".venv", ".venv-2.7.0")
        for name in ("python", "pre-commit")
    ]
    for name in ("install.sh", *programs):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(RECORDER)
        (tmp_path / name).chmod(0o755)
    demo = [
        ".venv  python -m extras.preparation.synthetic demo/data",
        ".venv  python main.py yamls/demo.yaml",
    ]
    assert make(tmp_path, "demo") == [".venv  install.sh ", *demo]
    assert make(tmp_path, "demo") == demo
    assert make(tmp_path, "test")[0] == ".venv  install.sh dev"
    assert make(tmp_path, "demo") == demo
    again = make(tmp_path, "test")
    assert again[-1] == f".venv  {PYTEST}" and not any("install" in call for call in again)
    assert make(tmp_path, "install", "WITH=wandb onnx") == [".venv  install.sh wandb onnx"]
    older = make(tmp_path, "test", "TORCH=2.7.0")
    assert older[0] == ".venv-2.7.0 2.7.0 install.sh dev"
    assert older[-1] == f".venv-2.7.0 2.7.0 {PYTEST}"
    os.utime(tmp_path / "uv.lock", (2**32, 2**32))  # make sees the lock file as changed
    assert make(tmp_path, "demo")[0] == ".venv  install.sh "


def test_dockerfile_passes_hadolint() -> None:
    hadolint = str(Path(sys.executable).with_name("hadolint"))
    process = subprocess.run(
        [hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr


def test_docker_image_installs_the_project_with_make() -> None:
    steps = [s.partition(" ") for s in re.sub(r"\\\n", " ", DOCKERFILE).splitlines()]
    runs = [rest for word, _, rest in steps if word == "RUN"]
    assert runs[1].startswith('make install WITH="$WITH"')
    files, wheels, *_ = [rest.split() for word, _, rest in steps if word == "COPY"]
    lock = re.search(r"^LOCK := (.*)", MAKEFILE, re.M)
    assert lock and {"Makefile", *lock[1].split()} == set(files[1:-1])
    assert wheels[1:] == ["wheels", "wheels"]
    assert {"g++", "make", "python3-dev", "python3-venv"} <= set(runs[0].split())
    users = [rest for word, _, rest in steps if word == "USER"]
    assert users and users[-1] not in ("root", "0")
    page = (ROOT / "docs/install.md").read_text()
    assert "--shm-size" in DOCKERFILE and "--shm-size" in page
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "runs", "ade20k", "demo"} <= set(ignored)


@pytest.mark.skipif(
    not torch.__version__.startswith("2.15."), reason="the image has the default torch"
)
def test_docker_image_has_the_cuda_version_of_pytorch() -> None:
    assert f"FROM nvidia/cuda:{torch.version.cuda}." in DOCKERFILE


def images(folder: Path) -> set[str]:
    """Return the Docker images in the Kubernetes and MosaicML platform configs."""
    job = yaml.safe_load((folder / "launch/kubernetes.yaml").read_text())
    pods = [
        r["template"]["spec"]["containers"] for r in job["spec"]["pytorchReplicaSpecs"].values()
    ]
    platform = yaml.safe_load((folder / "yamls/mcloud_run.yaml").read_text())
    return {c["image"] for containers in pods for c in containers} | {platform["image"]}


def test_docker_image_has_same_name_in_all_launch_files(tmp_path: Path) -> None:
    default = re.search(r"^IMAGE := (\S+)", MAKEFILE, re.M)
    assert default and images(ROOT) == {default[1]}
    for name in ("Makefile", "launch/kubernetes.yaml", "yamls/mcloud_run.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "docker").write_text(RECORDER)
    (tmp_path / "docker").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        (call,) = make(tmp_path, "image", "IMAGE=example.com/me/deeplab:1")
    assert call.endswith("docker build --tag example.com/me/deeplab:1 .")
    assert images(tmp_path) == {"example.com/me/deeplab:1"}
