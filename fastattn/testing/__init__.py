"""The conformance kit: sample problems, the accuracy law, memory that bites, samples for torch.library.opcheck.

    from fastattn import testing

    for suite in testing.suites().values():
        for case in suite.cases:
            testing.check(suite.function, suite, case, dtype=torch.bfloat16)      # raises ConformanceError

`check` takes any function with the suite's parameter names, so other libraries can be held to the same law.
`python -m fastattn.testing --help` does it from the command line.
"""

from fastattn.testing.conformance import (
    ConformanceError,
    Measurement,
    Report,
    assert_lawful,
    check,
    evaluate,
    examine,
    geometric_mean_ratio,
    same_bits,
    suites,
)
from fastattn.testing.memory import GuardedOutputs, guarded, poisoned_memory
from fastattn.testing.opcheck import metadata, opcheck_samples, recorded_calls

__all__ = [
    "ConformanceError",
    "GuardedOutputs",
    "Measurement",
    "Report",
    "assert_lawful",
    "check",
    "evaluate",
    "examine",
    "geometric_mean_ratio",
    "guarded",
    "metadata",
    "opcheck_samples",
    "poisoned_memory",
    "recorded_calls",
    "same_bits",
    "suites",
]
