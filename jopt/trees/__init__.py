"""Many leaves: what they are called, what they weigh, how they outlive the process.

In reading order: `paths` (one name per leaf, the same for every framework), `rules`
(pattern to value, by path), `report` (the table of all leaves), `structure` (a tree as
JSON and a list of arrays), `manifest` (the checksums of leaves and files), `placement`
(shardings as JSON, shards as blocks), `storage` (leaves as few arrays, and back),
`container`, `outline` and `single_file` (one safetensors file for one tree),
`checkpoint` (save, restore and the steps in between), `orientation` (kernels [in, out]
or [out, in]), `compressed_tensors` and `gguf_file` (weights of other ecosystems).
"""
