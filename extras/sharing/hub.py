"""Uploads of weights to the Hugging Face hub, or to the hub set in `HF_ENDPOINT`.

Call `check_repo("user/name")` before any slow work. Then call `push("first-hub",
["model.safetensors", "README.md"], "user/name")` to upload the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from errors import UserError, one_line


def check_repo(repo: str) -> None:
    """Check that there is a token and that it gives access to a repository.

    Args:
        repo: Repository, as `user/name`.

    Raises:
        UserError: The token is missing or lacks access, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError(f"--repo {repo}: no token found; run hf auth login, or set HF_TOKEN")
    with _explained_errors(repo):
        HfApi().repo_info(repo)


def push(folder: Path, names: Sequence[str], repo: str) -> str:
    """Upload files to a repository in one commit.

    Args:
        folder: Folder of the files.
        names: Names of the files, in the folder and in the repository.
        repo: Existing repository, as `user/name`.

    Returns:
        The URL of the commit.

    Raises:
        UserError: The hub cannot be reached or rejects the files.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = [CommitOperationAdd(name, folder / name) for name in names]
    with _explained_errors(repo):
        commit = HfApi().create_commit(repo, files, commit_message="Weights and model card")
    return commit.commit_url


@contextmanager
def _explained_errors(repo: str) -> Iterator[None]:
    """Convert exceptions from the hub's client to one-line errors."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        # Base exception of the HTTP client that huggingface-hub uses.
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        yield
        return
    except RepositoryNotFoundError:
        reason = (
            f"the repository does not exist at {constants.ENDPOINT}, or the token has no access to "
            "it; create the repository first"
        )
    except HFValidationError as error:
        reason = f"expected user/name: {one_line(error)}"
    except OfflineModeIsEnabled:
        reason = "uploads are disabled by HF_HUB_OFFLINE; unset this variable"
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        hints = {401: "check the token", 403: "check that the token may write"}
        reason = (
            f"the hub answered with status {status}; {hints.get(status, 'try again later')} "
            f"({(error.server_message or one_line(error))[:200]})"
        )
    except (OSError, HTTPError) as error:  # The network connection failed.
        reason = (
            f"cannot reach {constants.ENDPOINT} ({one_line(error)[:200]}); check the network "
            "connection"
        )
    raise UserError(f"--repo {repo}: {reason}")
