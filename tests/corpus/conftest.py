"""What the cases of the corpus stand in."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def surroundings():
    """No cluster."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TF_CONFIG", "KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A function from a word to the folder that it stands for, made once a session."""
    from starting_points import MAKERS

    made = {}

    def folder_of(word):
        if word not in made:
            made[word] = tmp_path_factory.mktemp("start") / word
            MAKERS[word](made[word])
        return made[word]

    return folder_of
