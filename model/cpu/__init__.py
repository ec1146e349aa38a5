"""Decoding on CPUs: its program, and its layout of the weights.

What the CPU backend needs of a single operation is in that operation's file for CPUs (`model.kernels`).

`decode`: the layers unrolled, with contexts read once per call.
`weights`: base weights and adapters cut into layers, in bfloat16 also as [out, in].
"""
