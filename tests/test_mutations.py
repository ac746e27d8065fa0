"""The list of faults is kept up with the source: each one's text stands there once."""

import pytest
from mutate import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_place_of_a_fault_is_there(fault):
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.text) == 1
    assert fault.becomes != fault.text
