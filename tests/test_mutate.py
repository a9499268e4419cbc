"""The faults of tests/faults still match the code, and their tests exist.

Planting them takes hours and is done separately.
"""

import re
from collections import Counter

import pytest

from tests.mutate import FAULTS, ROOT, named_tests

EVERY = [fault for faults in FAULTS.values() for fault in faults]


@pytest.mark.parametrize("fault", EVERY, ids=lambda fault: fault.what)
def test_a_fault_stands_where_it_is_planted(fault):
    assert (ROOT / fault.path).read_text().count(fault.old) == 1
    assert fault.new != fault.old


@pytest.mark.parametrize("fault", FAULTS["cumo_model"], ids=lambda fault: fault.what)
def test_a_fault_names_tests_that_exist(fault):
    assert named_tests(fault)
    for test in named_tests(fault):
        path, _, name = test.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M), test


def test_no_name_occurs_twice_in_a_file():
    assert max(Counter((fault.what, fault.path) for fault in EVERY).values()) == 1
