"""What makes the golden files of another package needs that package, and is no test."""

collect_ignore = ["make_compressed_tensors.py"]
