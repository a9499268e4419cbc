"""A folder with the data and the model of small_runs."""

import pytest

from tests.model.training.small_runs import write_data, write_model


@pytest.fixture
def folder(tmp_path, tiny_config):
    write_data(tmp_path)
    write_model(tmp_path, tiny_config)
    return tmp_path
