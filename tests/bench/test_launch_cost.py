"""What a launch costs: that it is measured, and that no op goes through many more functions than today."""

import pytest
import torch

import fastattn
from fastattn.bench import launch_cost

pytestmark = pytest.mark.compiled

#: Python functions entered by a forward. A time would depend on the neighbours; 15 us are about 60 of them.
MOST_FRAMES = 75


def test_the_launcher_does_nothing_and_counts():
    gate = torch.zeros(4, 16)
    with launch_cost.launching_nothing() as count:
        fastattn.swiglu(gate, gate, backend="triton")
    assert count == [1] and gate.sum() == 0


@pytest.mark.parametrize("suite", launch_cost.chosen(None), ids=lambda suite: suite.name)
def test_cost(suite):
    with launch_cost.launching_nothing() as count:
        cost = launch_cost.measure(suite, count, calls=1, batches=1)
    assert cost.forward > 0.0 and cost.launches[0] >= 1
    assert cost.frames <= MOST_FRAMES
