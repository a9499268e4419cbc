"""The faults of tests/mutate.py still match the code; running them takes an hour and is done separately."""

import pytest

from tests.mutate import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_fault_stands_where_it_is_planted(fault):
    assert (ROOT / fault.path).read_text().count(fault.old) == 1
    assert fault.new != fault.old
