"""Models that the compressed-tensors package compressed, and its numbers for them.

Run where torch and compressed-tensors are installed; the committed files are from
compressed-tensors 0.20.0 and torch 2.13.0:

    python tests/trees/golden/make_compressed_tensors.py
"""

import importlib.metadata
import json
import pathlib

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

VERSION = importlib.metadata.version("compressed-tensors")
HERE = pathlib.Path(__file__).parent / "compressed_tensors"
INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
# name: bits, symmetric, strategy, group size, dtype, inputs, shape
CASES = {
    "int4_group": (4, True, "group", 16, torch.bfloat16, None, (5, 32)),
    "int4_asymmetric": (4, False, "group", 8, torch.float32, None, (9, 24)),
    "int4_asymmetric_rows": (
        4,
        False,
        "channel",
        None,
        torch.float16,
        None,
        (3, 13),
    ),
    "int3_group": (3, True, "group", 8, torch.float32, None, (4, 40)),
    "int8_channel": (8, True, "channel", None, torch.bfloat16, INPUTS, (6, 10)),
    "int8_tensor": (8, True, "tensor", None, torch.float32, INPUTS, (4, 7)),
    "int8_asymmetric": (8, False, "channel", None, torch.float32, INPUTS, (4, 6)),
    "int8_packed": (8, True, "group", 4, torch.float32, None, (4, 8)),
}


def compress(bits, symmetric, strategy, group_size, dtype, inputs, shape):
    """Compress one weight; return tensors, scheme, format and decompressed weight."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
    }
    layout = "pack-quantized" if inputs is None else "int-quantized"
    scheme = QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs, format=layout
    )
    size = torch.arange(shape[0] * shape[1])
    weight = (((size * 37) % 101 - 47) / 16).to(dtype).reshape(shape)
    if strategy == "tensor":
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    else:
        groups = weight.reshape(shape[0], -1, group_size or shape[1])
        low, high = groups.amin(-1), groups.amax(-1)
    scale, zero_point = calculate_qparams(low, high, scheme.weights)
    state = {
        "weight": weight,
        "weight_scale": scale.to(dtype),
        "weight_zero_point": zero_point.to(torch.int8),
    }
    compressor = BaseCompressor.get_value_from_registry(layout)
    tensors = compressor.compress(state, scheme)
    dense = compressor.decompress(tensors, scheme)["weight"]
    return tensors, scheme, layout, dense


def main():
    """Write a directory per case."""
    for name, case in CASES.items():
        tensors, scheme, layout, dense = compress(*case)
        directory = HERE / name
        directory.mkdir(parents=True, exist_ok=True)
        config = QuantizationConfig(
            config_groups={"group_0": scheme},
            format=layout,
            quantization_status="compressed",
            ignore=["lm_head"],
        )
        held = {f"model.up.{part}": tensor for part, tensor in tensors.items()}
        held["lm_head.weight"] = torch.ones(2, 3, dtype=case[4])
        about = {"format": "pt", "by": f"compressed-tensors {VERSION}"}
        save_file(held, directory / "model.safetensors", about)
        save_file({"weight": dense}, directory / "dense.st")
        text = json.dumps({"quantization_config": config.to_dict()}, default=str)
        (directory / "config.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
