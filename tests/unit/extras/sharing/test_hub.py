"""Tests of extras/sharing/hub.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.card import exported, photo, the_hub, weights  # noqa: F401
from tests.support.hub_server import REPO, Hub

pytestmark = pytest.mark.usefixtures("small_network")


def test_token_without_write_access_gives_a_one_line_error(
    the_hub: Hub, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from errors import UserError
    from extras.sharing.hub import push

    the_hub.writable = False
    with pytest.raises(
        UserError, match=r"the hub answered with status 403; check that the token may write"
    ) as caught:
        push(exported, ["README.md"], REPO)
    assert "\n" not in str(caught.value)
