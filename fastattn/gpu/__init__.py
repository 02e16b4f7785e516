"""What every kernel for GPUs stands on: the devices, deferred kernels, rows of tensors, tile sizes, device functions.

Host code of an op's triton backend is fastattn/ops/<op>/triton.py, which never imports Triton: its device code is in
triton_*.py beside it and in modules of this package that import Triton, loaded with the first launch (`Deferred`). So
fastattn imports without Triton, and in a process that never launches a kernel nobody waits for it. norms.py and
norm_kernels.py serve both norms.
"""
