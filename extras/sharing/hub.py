"""A folder of weights on a model hub: Hugging Face's, or the one that `HF_ENDPOINT` names.

check_repo("user/name")     # before anything slow begins
push("first-hub", ["model.safetensors", "README.md"], "user/name")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from errors import UserError, one_line


def check_repo(repo: str) -> None:
    """See that there is a token, and a repository that it may see.

    Raises:
        UserError: There is not, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError(f"--repo {repo}: no token; call hf auth login, or set HF_TOKEN")
    with _told(repo):
        HfApi().repo_info(repo)


def push(folder: Path, names: Sequence[str], repo: str) -> str:
    """Put files into a repository, as one commit.

    Args:
        folder: Where they are.
        names: Their names in it.
        repo: `user/name`; it exists.

    Returns:
        The commit's address.

    Raises:
        UserError: The hub cannot be reached, or does not take them.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = [CommitOperationAdd(name, folder / name) for name in names]
    with _told(repo):
        commit = HfApi().create_commit(repo, files, commit_message="Weights and model card")
    return commit.commit_url


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # of the client that huggingface-hub uses, which its module imports
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    where = f"--repo {repo}"
    try:
        yield
    except RepositoryNotFoundError as error:
        reason = f"{constants.ENDPOINT} has no such repository, or the token may not see it"
        raise UserError(f"{where}: {reason}; create it there first") from error
    except HFValidationError as error:
        raise UserError(f"{where}: should be user/name: {one_line(error)}") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{where}: HF_HUB_OFFLINE is set") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        said = error.server_message or one_line(error)
        hint = {401: "is the token right? ", 403: "may the token write there? "}.get(status, "")
        raise UserError(f"{where}: {hint}the hub says {status}: {said[:200]}") from error
    except (OSError, HTTPError) as error:  # of the network
        raise UserError(
            f"{where}: cannot reach {constants.ENDPOINT}: {one_line(error)[:200]}"
        ) from error
