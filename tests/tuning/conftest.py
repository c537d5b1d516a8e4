"""Fixtures of the search tests."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_chief():
    """A search in this process is alone, whatever the surroundings say."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TUNER_ID", "ORACLE_IP", "ORACLE_PORT"):
            patch.delenv(f"KERASTUNER_{name}", raising=False)
        yield
