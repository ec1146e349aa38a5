"""Kernels: operations that have one interface and one implementation per backend.

Everything that is known about a backend (layouts, tiles, barriers, what its compiler handles badly) belongs
in that backend's file of a kernel. Callers see only the interface, the folder's `__init__`.

`attention/`: causal attention over packed rows, with its gradient.
`paged_attention/`: attention of new tokens to the paged cache of keys and values.
`product/`: products with a decoder's matrices and adapters.
`grouped_product/`: products of sorted rows with one matrix per group, for mixtures of experts.
`rotation/`: rotary position embedding.
"""
