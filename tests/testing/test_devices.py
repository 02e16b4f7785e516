"""Cases are for every device: neither what they draw nor what they are compared with mixes devices."""

import pytest
import torch

from fastattn import testing

#: What definitions may not do to tensors without values, and do: look at lengths.
LOOKS = ("item() cannot be called on meta", "Cannot copy out of meta tensor")


@pytest.mark.parametrize("suite", testing.suites().values(), ids=testing.suites())
def test_cases_stay_on_their_device(suite):
    mixed = []
    for case in suite.cases:
        arguments = suite.arguments(case, "meta", torch.bfloat16)
        for function in (suite.truth, suite.peer):
            try:
                function(**arguments)
            except (RuntimeError, NotImplementedError) as error:
                if not any(text in str(error) for text in LOOKS):
                    mixed.append(f"{case.name}: {error}")
    assert mixed == []
