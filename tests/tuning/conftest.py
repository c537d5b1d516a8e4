"""Fixtures of the search tests."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def embedded_data_dir(tmp_path_factory):
    """The embedded data set is written once a session, outside of the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        for name in ("TUNER_ID", "ORACLE_IP", "ORACLE_PORT"):
            patch.delenv(f"KERASTUNER_{name}", raising=False)
        yield
