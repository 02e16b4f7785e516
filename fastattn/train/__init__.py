"""Training a GPT on text: configuration, data, checkpoints, the trainer, and the comparison with torch's
kernels."""
