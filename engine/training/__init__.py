"""Training: from datums to packed micro-batches, programs, gradients and states."""
