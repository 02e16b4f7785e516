"""What a launch of attention's Triton kernels does beyond the plain product: one bit each of the constant FEATURES.

Every set of bits is a kernel of its own, compiled when it is first wanted.
"""

from __future__ import annotations

#: Keys end at the query's position plus `right`, and begin at the position minus `left`; the first ones are lifted.
RIGHT, LEFT, PREFIX = 1, 2, 4
DOCUMENTS, BOOL_MASK, ADDITIVE_MASK = 8, 16, 32
SOFTCAP, ALIBI, SINKS, DROPOUT = 64, 128, 256, 512
#: Rows of many sequences lie one behind the other.
PACKED = 1024
#: Scores are powers of two of (product * (scale * log2 e)), one fused multiplication and addition: what 16 bits need.
#: Without it they are natural, and their difference from the largest one is exact.
FOLDED = 2048
#: lse has a gradient.
GRAD_LSE = 4096
#: What the rounding of lse makes of a row's probabilities is put right: all of it where a mask holds huge numbers and
#: the sum does not show in lse, and the last bits where results have 24.
REST = 8192
#: What a tile needs registers for beyond the plain product: kernels with any of these have smaller tiles ("featured").
HEAVY = DOCUMENTS | BOOL_MASK | ADDITIVE_MASK | SOFTCAP | ALIBI | DROPOUT
