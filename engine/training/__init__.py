"""Gradients and steps: from datums to packed micro-batches, programs and states."""
