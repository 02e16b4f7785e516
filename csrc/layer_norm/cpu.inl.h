// LayerNorm and RMSNorm, forward and backward, fp32 inside.
//   walk.inl.h      how both passes walk over rows; dropout
//   forward.inl.h   statistics and results
//   backward.inl.h  gradients
#pragma once
#include "backward.inl.h"
#include "forward.inl.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr NormKernels kNormKernels{{norm_forward_tasks, norm_forward_scratch, run_norm_forward},
                                   {norm_backward_tasks, norm_backward_scratch, run_norm_backward}};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
