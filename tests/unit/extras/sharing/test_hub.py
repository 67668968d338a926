"""Tests of extras/sharing/hub.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.card import the_hub  # noqa: F401
from tests.support.hub_server import REPO, Hub


def test_token_without_write_access_gives_a_one_line_error(the_hub: Hub, tmp_path: Path) -> None:
    from errors import UserError
    from extras.sharing.hub import push

    the_hub.writable = False
    (tmp_path / "README.md").write_text("A model card.")
    with pytest.raises(
        UserError, match=r"the hub answered with status 403; check that the token may write"
    ) as caught:
        push(tmp_path, ["README.md"], REPO)
    assert "\n" not in str(caught.value)
