"""Integer weights in the layout of compressed-tensors, which vLLM and others load.

A directory: `model.safetensors`, and `config.json` with a `quantization_config` that
says which modules are quantized how. A module's weight is [out, in], and its groups run
along the inputs:

    pack-quantized   weight_packed int32 [out, in * bits / 32]: a little-endian stream
                     of code + 2^(bits - 1);  weight_shape
    int-quantized    weight int8 [out, in]
    both             weight_scale [out, groups] (channel: [out, 1]; tensor: [1]) and,
                     where asymmetric, weight_zero_point

There codes are decoded in the dtype of the scales. So scales are written in the dtype
of the array where it holds them, else in float32, and what is decoded there are the
numbers of `jopt.dequantize`, bit for bit. Kernels are [in, out] in most JAX models: the
order "nk" of a `QuantizedArray` has the very bytes of the other orientation.
"""

from jopt.trees.compressed_tensors.reading import (
    read_compressed_tensors as read_compressed_tensors,
)
from jopt.trees.compressed_tensors.writing import (
    write_compressed_tensors as write_compressed_tensors,
)
