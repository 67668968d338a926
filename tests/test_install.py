"""Setting up: that the lists of packages agree, and what install.sh, make and the image do.

Programs that install are stand-ins here; CI installs in earnest before it runs this.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from training.schema import LOGGERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK: dict[str, Any] = tomllib.loads((ROOT / "uv.lock").read_text())
README = (ROOT / "README.md").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
DEFAULT_TORCH = PROJECT["tool"]["uv"]["default-groups"]


def normal(requirements: list[str]) -> set[str]:
    """Requirements, each as the `packaging` library writes it, with names in their normal form."""
    result = set()
    for line in requirements:
        requirement = Requirement(line)
        requirement.name = canonicalize_name(requirement.name)
        result.add(str(requirement))
    return result


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


# The lists of packages.


def test_requirements_txt_lists_what_pyproject_does() -> None:
    text = (ROOT / "requirements.txt").read_text()
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    (group,) = DEFAULT_TORCH
    torches = PROJECT["dependency-groups"][group]
    named = names(torches)
    rest = [line for line in PROJECT["project"]["dependencies"] if not names([line]) & named]
    assert names(PROJECT["project"]["dependencies"]) >= named
    assert normal([line for line in lines if line]) == normal(torches + rest)


def test_the_lock_is_of_this_pyproject() -> None:
    (own,) = [
        package for package in LOCK["package"] if package["name"] == PROJECT["project"]["name"]
    ]

    def written(entries: list[dict[str, Any]]) -> set[str]:
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

    assert written(own["metadata"]["requires-dist"]) == normal(PROJECT["project"]["dependencies"])
    locked = {name: written(entries) for name, entries in own["metadata"]["requires-dev"].items()}
    assert locked == {canonicalize_name(name): normal(flat(g)) for name, g in groups.items()}
    assert LOCK["requires-python"].replace(" ", "") == PROJECT["project"]["requires-python"]


def test_composers_requirements_are_its_own_but_for_torch() -> None:
    """pyproject.toml rewrites its metadata, which a newer Composer would make wrong."""
    (ours,) = [e for e in PROJECT["tool"]["uv"]["dependency-metadata"] if e["name"] == "mosaicml"]
    assert importlib.metadata.version("mosaicml") == ours["version"]
    extras = set(ours["provides-extra"])
    wanted = set()
    for line in importlib.metadata.requires("mosaicml") or []:
        requirement = Requirement(line)
        extra = re.search(r'extra == "([^"]*)"', str(requirement.marker))
        if requirement.name not in ("torch", "torchvision") and (not extra or extra[1] in extras):
            wanted.add(line)
    relaxed = [
        line for line in ours["requires-dist"] if not re.match(r"torch(vision)?\b(?!_)", line)
    ]
    assert normal(relaxed) == normal(list(wanted))


def test_every_logger_has_a_group() -> None:
    missing = {name for name, package in LOGGERS.items() if package} - set(
        PROJECT["dependency-groups"]
    )
    assert not missing - {"progress_bar", "console", "file"}


def readme_block(title: str) -> str:
    block = README[README.index(title) :]
    return block[block.index("```bash\n") + len("```bash\n") :].partition("\n```")[0]


def test_what_pip_is_given_in_an_image_leaves_torch_alone(tmp_path: Path) -> None:
    (line,) = [
        line for line in readme_block("With pip,").splitlines() if line.startswith("uv export")
    ]
    uv = str(Path(sys.executable).with_name("uv"))
    command = [uv, *line.split()[1:-1], str(tmp_path / "rest.txt")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    lines = (tmp_path / "rest.txt").read_text().splitlines()
    given = names([line for line in lines if not line.lstrip().startswith("#")])
    assert not {name for name in given if re.match(r"torch$|torchvision|triton|nvidia|cuda", name)}
    assert given >= names(PROJECT["project"]["dependencies"]) - {
        "torch",
        "torchvision",
        "mmcv-full",
    }
    assert "addict" in given  # mmcv-full's, which --no-deps would leave out


# install.sh

TOOLS = (
    "bash",
    "cat",
    "chmod",
    "cp",
    "dirname",
    "grep",
    "mkdir",
    "mktemp",
    "rm",
    "sort",
    "tail",
    "touch",
)
# Answers as a Python of this path does; one without headers, only where they are not asked for.
FITS = '#!/bin/sh\necho "{path}"\n'
NO_HEADERS = '#!/bin/sh\ncase "$2" in *Python.h*) exit 1;; esac\necho "{path}"\n'
UNFIT = "#!/bin/sh\nexit 1\n"
UV = """#!/bin/sh
echo "$UV_PROJECT_ENVIRONMENT uv $*" >>calls
case "$*" in
"cache dir") echo /cache; exit ${TOO_OLD:-0} ;;
"python install"*) exit ${NO_DOWNLOADS:-0} ;;
"python find"*) echo /brought/python3.12 ;;
*--dry-run*) echo "$PLAN" ;;
sync*)
  case "$*" in *"${FAILING:-nothing}"*) echo "$FAILURE" >&2; exit 2 ;; esac
  bin=$UV_PROJECT_ENVIRONMENT/bin
  mkdir -p "$bin"
  printf '#!/bin/sh\\ncase "$*" in *mmcv.ops*) exit 0;; esac; exit 1' >"$bin/python"
  chmod +x "$bin/python" ;;
esac
"""
# Makes an environment, whose pip brings a uv.
HOST = """#!/bin/sh
case "$*" in
*venv*) mkdir -p .uv/bin; cp "$0" .uv/bin/python ;;
*pip*) echo "pip $*" >>calls; cp uv-that-pip-brings .uv/bin/uv ;;
*) exit 1 ;;
esac
"""


class Machine:
    """A folder with the files of the project that set it up, and a PATH of stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)
        for name in ("python3.12", "python3.11", "python3.10", "python3", "python"):
            self.program(name, UNFIT)
        for name in ("c++", "cc"):
            self.program(name, UNFIT)
        self.program("uv", UV)
        for name in ("install.sh", "pyproject.toml", "uv.lock", "Makefile"):
            shutil.copy(ROOT / name, folder / name)

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text.format(path=f"/real/{name}") if "{path}" in text else text)
        path.chmod(0o755)

    def install(self, *groups: str, **environment: str) -> tuple[list[str], str, int]:
        """The lines of ./install.sh, what it says last to stderr, and its status."""
        home = {"PATH": str(self.bin), "HOME": str(self.folder), "PYENV_ROOT": str(self.folder)}
        done = subprocess.run(
            ["bash", "install.sh", *groups],
            cwd=self.folder,
            env={**home, **environment},
            capture_output=True,
            text=True,
        )
        return done.stdout.splitlines(), done.stderr.strip(), done.returncode

    def calls(self) -> list[str]:
        """What was called since the last look, without what only asks."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [
            line.strip() for line in lines if "--dry-run" not in line and "cache dir" not in line
        ]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_each_step_is_a_line_with_its_time(machine: Machine) -> None:
    machine.program("python3.11", FITS)
    lines, error, status = machine.install("wandb", PLAN="Would download 9 packages")
    assert (error, status) == ("", 0)
    steps = [re.fullmatch(r"(\S+),? .*\(.*\) \.\.\. \d+ s", line) for line in lines]
    assert [step and step[1].rstrip(",") for step in steps] == ["Packages", "mmcv-full", "All"]
    sync = ".venv uv sync --frozen --python /real/python3.11 --group wandb"
    packages = f"{sync} --inexact --no-install-package mmcv-full"
    assert machine.calls() == [packages, f"{sync} --offline", sync]
    # A second call has nothing to install, keeps what the first was asked for, and its Python.
    machine.program("python3.11", UNFIT)
    machine.program("python3.12", FITS)
    (folder := machine.folder / ".venv/bin/python").write_text(FITS.format(path="/real/python3.11"))
    folder.chmod(0o755)
    lines, error, status = machine.install("onnx", PLAN="Would make no changes")
    assert (len(lines), error, status) == (1, "", 0)
    (call,) = machine.calls()
    assert call == ".venv uv sync --frozen --python /real/python3.11 --group onnx --group wandb"


def test_another_torch_has_a_place_of_its_own(machine: Machine) -> None:
    machine.program("python3.10", FITS)
    _, error, status = machine.install(TORCH="2.7.0")
    assert (error, status) == ("", 0)
    (call,) = machine.calls()
    chosen = "--python /real/python3.10 --no-default-groups --group torch-2.7.0"
    assert call == f".venv-2.7.0 uv sync --frozen {chosen}"
    assert "torch-2.7.0" in PROJECT["dependency-groups"]


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        ("error: No space left on device (os error 28)", "the disk is full: .* take 8 GB"),
        (
            "c++ -I x\nx.h:1: fatal error: Python.h: No such file or directory",
            "no headers; .*python3-dev",
        ),
        ("error: Failed to fetch: `x`\n  cause: dns error", "a download failed; call again"),
        ("error: something else", "error: something else\nerror: the lines above say why"),
    ],
)
def test_a_failing_step_says_what_to_do(machine: Machine, failure: str, line: str) -> None:
    machine.program("python3.12", FITS)
    lines, error, status = machine.install(PLAN="Would download", FAILING="sync", FAILURE=failure)
    assert status == 1 and lines[-1].endswith("... failed")
    assert re.search(line, error), error
    assert error.splitlines()[-1].startswith("error: ")


def test_a_machine_without_a_compiler(machine: Machine) -> None:
    machine.program("python3.12", FITS)
    (machine.bin / "c++").unlink()
    failure = "error: command 'c++' failed: No such file or directory"
    _, error, status = machine.install(PLAN="Would install", FAILING="python3.12", FAILURE=failure)
    assert (error.partition(";")[0], status) == ("error: no C++ compiler", 1)


def test_pythons(machine: Machine) -> None:
    """One with headers comes first, then one that uv brings, then one without headers."""
    refused = "error: uv could not bring a Python; install 3.10, 3.11 or 3.12"
    lines, error, status = machine.install(NO_DOWNLOADS="2")
    assert status == 1 and error.startswith(refused) and len(error.splitlines()) == 1
    assert machine.calls() == ["uv python install --no-bin 3.12"]

    machine.program("python3", NO_HEADERS)
    lines, error, status = machine.install(NO_DOWNLOADS="2")
    assert (error, status) == ("", 0) and "not to be had; trying /real/python3, without" in lines[0]
    assert machine.calls()[-1].endswith("--python /real/python3")
    shutil.rmtree(machine.folder / ".venv")

    lines, error, status = machine.install()
    assert (error, status) == ("", 0) and machine.calls()[-1].endswith(
        "--python /brought/python3.12"
    )
    shutil.rmtree(machine.folder / ".venv")

    versions = machine.folder / "versions/3.10.13/bin"  # of pyenv, whose shims may answer nothing
    versions.mkdir(parents=True)
    (versions / "python").write_text(FITS.format(path="/pyenv/3.10"))
    (versions / "python").chmod(0o755)
    machine.install()
    assert machine.calls()[-1].endswith("--python /pyenv/3.10")

    _, error, status = machine.install(PYTHON="python3.11")
    assert (error, status) == ("error: PYTHON=python3.11 is not a Python 3.10, 3.11 or 3.12", 1)


@pytest.mark.parametrize("there", [None, UV.replace("${TOO_OLD:-0}", "2")], ids=["none", "too old"])
def test_uv_is_brought_where_there_is_none_to_use(machine: Machine, there: str | None) -> None:
    (machine.bin / "uv").unlink()
    if there:
        machine.program("uv", there)
    machine.program("python3", HOST)
    machine.program("python3.12", FITS)
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


def test_a_machine_that_cannot_have_uv(machine: Machine) -> None:
    (machine.bin / "uv").unlink()
    _, error, status = machine.install()
    assert status == 1 and error.startswith("error: no Python here can install uv; install uv, or")


def test_install_sh_is_sound() -> None:
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run([shellcheck, ROOT / "install.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# make

RECORDER = '#!/bin/sh\necho "$VENV $TORCH $(basename $0) $*" >>calls\n'
PYTEST = "python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder"


def make(folder: Path, *arguments: str) -> list[str]:
    """What a make target calls."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("VENV", "TORCH")
    }
    environment = {
        k: v for k, v in environment.items() if not k.startswith("MAKE") and k != "MFLAGS"
    }
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    done = subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return calls.read_text().splitlines() if calls.exists() else []


def test_make_installs_once(tmp_path: Path) -> None:
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
    demo = [".venv  python -m dataset.synthetic demo/data", ".venv  python main.py yamls/demo.yaml"]
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
    os.utime(tmp_path / "uv.lock", (2**32, 2**32))  # as when it has changed
    assert make(tmp_path, "demo")[0] == ".venv  install.sh "


# The image


def test_the_dockerfile_is_sound() -> None:
    hadolint = str(Path(sys.executable).with_name("hadolint"))
    done = subprocess.run(
        [hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_is_set_up_as_a_machine_is() -> None:
    steps = [s.partition(" ") for s in re.sub(r"\\\n", " ", DOCKERFILE).splitlines()]
    runs = [rest for word, _, rest in steps if word == "RUN"]
    assert runs[1].startswith('make install WITH="$WITH"')
    copied = next(rest for word, _, rest in steps if word == "COPY").split()
    lock = re.search(r"^LOCK := (.*)", MAKEFILE, re.M)
    assert lock and {"Makefile", *lock[1].split()} == set(copied[1:-1])
    assert {"g++", "make", "python3-dev", "python3-venv"} <= set(runs[0].split())
    users = [rest for word, _, rest in steps if word == "USER"]
    assert users and users[-1] not in ("root", "0")
    assert "--shm-size" in DOCKERFILE and "--shm-size" in README
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "runs", "ade20k", "demo"} <= set(ignored)


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="the image has the default torch"
)
def test_the_image_has_torchs_cuda() -> None:
    assert f"FROM nvidia/cuda:{torch.version.cuda}." in DOCKERFILE


def images(folder: Path) -> set[str]:
    """The images that launch files and the platform's config name."""
    job = yaml.safe_load((folder / "launch/kubernetes.yaml").read_text())
    pods = [
        r["template"]["spec"]["containers"] for r in job["spec"]["pytorchReplicaSpecs"].values()
    ]
    platform = yaml.safe_load((folder / "yamls/mcloud_run.yaml").read_text())
    return {c["image"] for containers in pods for c in containers} | {platform["image"]}


def test_the_image_has_one_name(tmp_path: Path) -> None:
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
