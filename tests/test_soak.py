"""The long run, in short: everything at once, with faults, for two minutes or AMULET_SOAK_SECONDS."""

from __future__ import annotations

import os
import sys

import pytest


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.skipif(sys.platform == "win32", reason="stops clients by signals, and talks to a terminal")
def test_nothing_grows_and_every_response_is_accounted_for() -> None:
    from soak import soak

    # In so short a time, what has yet to be used for the first time counts, too.
    assert not soak(float(os.environ.get("AMULET_SOAK_SECONDS", "120")), share=0.2)
