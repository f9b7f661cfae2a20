"""What several test files share."""

import pytest

import data


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    data.make_toy(folder, train=24, test=12)
    return folder
