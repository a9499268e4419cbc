"""The faults of tests/mutate.py still fit the code they are to be planted in; planting them takes an hour."""

import pytest

from tests.mutate import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_fault_stands_where_it_is_planted(fault):
    assert (ROOT / fault.path).read_text().count(fault.old) == 1
    assert fault.new != fault.old
