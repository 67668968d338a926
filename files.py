"""Output files and folders that appear under their final name only when they are complete.

    write_file("scores.json", text)              # text or bytes
    write_image("overlay.jpg", picture, quality=92)
    with output_file("clip.mp4") as path:        # for a writer that needs a path
        encode(path)
    with output_folder("page") as folder:        # several files that belong together
        write_page(folder)

Each output is written to a hidden file `.unfinished-...` in the same folder and renamed at the end.
If any exception occurs, including KeyboardInterrupt, the unfinished file is removed and an older
file with the final name is kept. The hidden file is left behind only if the process is killed. This
module imports no slow packages.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import OutputError, UserError, one_line

if TYPE_CHECKING:
    from PIL import Image

PathLike = str | os.PathLike[str]
# Error codes for a full disk, an exhausted disk quota and a file that exceeds the size limit.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


def is_remote(path: PathLike) -> bool:
    """Return whether a path is a URL such as s3://bucket/folder."""
    return "://" in os.fspath(path)


def write_file(path: PathLike, data: bytes | str) -> None:
    """Write bytes, or text as UTF-8, to a file that appears only when it is complete.

    Args:
        path: Path of the file.
        data: Content of the file.

    Raises:
        OutputError: The disk is full.
        UserError: The file cannot be written.
    """
    content = data.encode() if isinstance(data, str) else data
    with output_file(path) as unfinished, open(unfinished, "xb") as file:
        file.write(content)


def write_image(path: PathLike, image: Image.Image, **options: Any) -> None:
    """Write an image as PNG or JPEG, depending on the path's extension.

    The image is encoded in memory first, because Pillow's own writer does not report a full disk.

    Args:
        path: Path of the file.
        image: Image to write.
        **options: Options for Pillow's `Image.save`.

    Raises:
        OutputError: The disk is full.
        UserError: The file cannot be written.
    """
    write_file(path, encode_image(Path(path).suffix, image, **options))


def encode_image(suffix: str, image: Image.Image, **options: Any) -> bytes:
    """Return an image encoded as PNG or JPEG.

    Args:
        suffix: File extension that selects the format, such as `.png`.
        image: Image to encode.
        **options: Options for Pillow's `Image.save`.
    """
    data = io.BytesIO()
    image.save(data, IMAGE_FORMATS[suffix.lower()], **options)
    return data.getvalue()


@contextmanager
def output_file(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path with the same extension, and rename it to `path` at the end.

    Missing parent folders are created, and symbolic links are followed. If `path` is a device or a
    pipe, such as /dev/stdout, it receives the complete content at the end.

    Args:
        path: Path of the file.

    Raises:
        OutputError: The disk is full.
        UserError: The file cannot be written.
    """
    with explain_output(path):
        if _is_stream(path):
            with tempfile.TemporaryDirectory() as folder:
                unfinished = Path(folder, f"output{Path(path).suffix}")
                yield unfinished
                with open(path, "wb") as stream:
                    stream.write(unfinished.read_bytes())
            return
        final = Path(os.path.realpath(path))
        final.parent.mkdir(parents=True, exist_ok=True)
        unfinished = _beside(final)
        try:
            with _final_name_in_errors(unfinished, path):
                yield unfinished
            if final.is_file():
                shutil.copymode(final, unfinished)
            os.replace(unfinished, final)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def output_folder(path: PathLike) -> Iterator[Path]:
    """Yield an empty folder, which is renamed to `path` or merged into it at the end.

    Files that exist only in `path` are kept.

    Args:
        path: Path of the folder.

    Raises:
        OutputError: The disk is full.
        UserError: The folder cannot be written.
    """
    final = Path(os.path.realpath(path))
    with explain_output(path):
        # If the folder exists, it may be a mount point. Create the unfinished folder inside it,
        # because a rename does not work across file systems.
        unfinished = _beside(final / "_" if final.is_dir() else final)
        unfinished.mkdir(parents=True)
        try:
            with _final_name_in_errors(unfinished, path):
                yield unfinished
            if final.is_dir():
                _move_into(unfinished, final)
            else:
                os.replace(unfinished, final)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def explain_output(path: PathLike) -> Iterator[None]:
    """Turn an OSError during writing into a one-line error that names `path`.

    An OSError that names another file, such as an input, is raised unchanged.

    Args:
        path: Path of the output.

    Raises:
        OutputError: The disk is full.
        UserError: The output cannot be written for another reason.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        reason = error.strerror or one_line(error)
        if error.errno in FULL:
            raise OutputError(
                f"{path}: {reason}; free up some space, or choose a different location"
            ) from error
        name = os.fspath(error.filename) if error.filename is not None else ""
        folder = os.path.dirname(os.path.realpath(path))
        hidden = isinstance(name, str) and ".unfinished-" in name
        if not name or hidden or os.path.realpath(name) == os.path.realpath(path):
            raise UserError(f"cannot write {path}: {reason}") from error
        # The error may name a parent folder of the output.
        if f"{folder}/".startswith(f"{os.path.realpath(name)}/"):
            raise UserError(
                f"cannot write {path} because of a problem with {name}: {reason}"
            ) from error
        raise


def check_outputs(outputs: Iterable[PathLike], inputs: Iterable[PathLike] = ()) -> None:
    """Reject outputs that are folders or would overwrite an input or another output.

    Args:
        outputs: Paths of the files that a command will write.
        inputs: Paths of the files that the command reads.

    Raises:
        UserError: An output path is a folder, an input or another output.
    """
    read = {os.path.realpath(path) for path in inputs}
    written = set()
    for path in outputs:
        if _is_stream(path):
            continue
        final = os.path.realpath(path)
        if final in read:
            raise UserError(
                f"{path} would be overwritten, but it is an input; choose a different name"
            )
        if final in written:
            raise UserError(f"{path}: two outputs have this name; give them different names")
        if os.path.isdir(final):
            raise UserError(f"cannot write {path}: it is a folder; give a file name")
        written.add(final)


def check_writable(path: PathLike) -> None:
    """Check that a file can be written, without leaving anything behind.

    The file's folder must exist.

    Args:
        path: Path of the file.

    Raises:
        OutputError: The disk is full.
        UserError: The file cannot be written.
    """
    if _is_stream(path):
        return
    with explain_output(path):
        final = Path(os.path.realpath(path))
        if final.exists() and not os.access(final, os.W_OK):
            raise UserError(f"cannot write {path}: it is read-only; choose a different file")
        unfinished = _beside(final)
        try:
            unfinished.touch(exist_ok=False)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def _final_name_in_errors(unfinished: Path, path: PathLike) -> Iterator[None]:
    """Replace the hidden path with `path` in error messages raised inside this context."""
    try:
        yield
    except (OutputError, UserError) as error:
        message = str(error)
        if str(unfinished) not in message:
            raise
        raise type(error)(message.replace(str(unfinished), os.fspath(path))) from error


def _is_stream(path: PathLike) -> bool:
    """Return whether a path is a device, a pipe or a socket."""
    with suppress(OSError):
        mode = os.stat(path).st_mode
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
    return False


def _beside(final: Path) -> Path:
    """Return an unused hidden path in a file's folder, with the same extension."""
    return final.with_name(f".unfinished-{secrets.token_hex(4)}{final.suffix}")


def _move_into(source: Path, target: Path) -> None:
    """Move a folder's files into another folder, replacing files with the same name."""
    for path in sorted(source.iterdir()):
        if path.is_dir() and (target / path.name).is_dir():
            _move_into(path, target / path.name)
        else:
            os.replace(path, target / path.name)
