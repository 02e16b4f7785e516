// What cross_entropy does to rows of logits that nobody needs afterwards: losses, then gradients in their place.
#pragma once
#include "../cross_entropy/params.h"

namespace fastattn {

struct LogitRows {
  float* logits;                  // (rows, columns) contiguous
  CrossEntropyForward forward;    // of them, without softcap
  CrossEntropyBackward backward;  // grad_input is not used
  bool losses;                    // row_loss and lse are wanted; else lse is given
  bool gradients;                 // wanted, in place of the logits
  bool narrow;                    // gradients are bf16, each row at the beginning of the logits' row
};

struct LinearCrossEntropyKernels {
  Kernel<LogitRows> rows;
  bool pairs;  // products of bf16 take pairs: their gradients may as well be bf16
};

}  // namespace fastattn
