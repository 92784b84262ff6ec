from __future__ import annotations

import pytest
from testinfra.host import Host
from testkit.apps import Deployed


@pytest.fixture
def shelf(host: Host) -> Deployed:
    return Deployed(host, "shelf")


@pytest.fixture
def annex(host: Host) -> Deployed:
    return Deployed(host, "annex")


@pytest.fixture(params=["shelf", "annex", "testapp"])
def app(host: Host, request: pytest.FixtureRequest) -> Deployed:
    return Deployed(host, request.param)
