"""Decoders: arrays in, arrays out.

folder.read_config(folder) -> config.ModelConfig
weight_files.headers(folder) -> tensors by name;  folder.digest(folder, config) -> which model it is
decoder.build(config, dtype) -> (graph, abstract base)
decoder.logical_axes(config) -> tree of axis names
load.find_model(model) -> folder;  load.load_base(folder, config, dtype, mesh) -> base
decoder.trunk(graph, base, tokens, position, start, lora, row_adapter, remat) -> hidden states
decoder.unembed(base) -> [V, D]
decoder.Decoder, decoder.Block: what the sampler drives itself, `nnx.merge(graph, base)`
lora.init_lora, lora.pad_rank, lora.stack_adapters
sharding.make_mesh, shardings_for, replicated, rows_sharding
"""
