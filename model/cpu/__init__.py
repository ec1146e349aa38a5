"""The sampler's programs on CPUs, and their layout of the weights.

What the CPU backend needs of a single operation is in that operation's file for CPUs (`model.kernels`).

`prefill`: each layer's context laid end to end, and the pages written once, after all layers.
`decode`: the layers unrolled, with contexts read once per call.
`weights`: base weights and adapters cut into layers, in bfloat16 also as [out, in].
"""
