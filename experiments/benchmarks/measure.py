"""Alternating medians, and the record of where they were taken."""

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax

import jopt


def hardware() -> dict[str, Any]:
    """Describe the machine and the versions that a figure belongs to."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")
        ]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "cpu": model,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "jopt": jopt.__version__,
    }


def alternate(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1
) -> dict[str, float]:
    """Run the candidates in turn and return the median seconds of each.

    A candidate returns what must be waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(warmup + rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def write(results: Mapping[str, Any], out: Path | None) -> None:
    """Write results with the hardware beside them, and print them."""
    record = {"hardware": hardware(), **results}
    text = json.dumps(record, indent=2)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
