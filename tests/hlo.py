"""What a compiled program exchanges between devices, read from its optimized HLO."""

import math
import re
from typing import NamedTuple

_KINDS = (
    "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|"
    "ragged-all-to-all|reduce-scatter|send|recv"
)
# `%name = type all-reduce(...)`; "-done" returns what "-start" began.
_CALL = re.compile(rf"%?([\w.-]+) = (.*?) ({_KINDS})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_BODY = re.compile(r"\bwhile\(.*?body=%?([\w.-]+)")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    """One operation between devices."""

    kind: str
    num_bytes: int  # of its result on one device
    computation: str
    line: str


def collectives(text: str) -> list[Collective]:
    """List what `compiled.as_text()` exchanges, in the order of the text."""
    found, computation = [], ""
    for line in text.splitlines():
        opening = _COMPUTATION.match(line)
        if opening:
            computation = opening.group(2)
        call = _CALL.search(line)
        if call:
            size = sum(_num_bytes(*array) for array in _ARRAY.findall(call.group(2)))
            found.append(
                Collective(call.group(3), size, computation, line.strip()[:300])
            )
    return found


def _num_bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group())
    return math.ceil(math.prod(int(d) for d in dims.split(",") if d) * bits / 8)


def largest(text: str) -> int:
    """Return the bytes of the largest result of an exchange; 0 where there is none."""
    return max((c.num_bytes for c in collectives(text)), default=0)


def assert_only_counts_travel(text: str, leaf_bytes: int) -> None:
    """Assert that every exchange is below one hundredth of a leaf."""
    for c in collectives(text):
        assert c.num_bytes * 100 < leaf_bytes, c


def loops(text: str) -> dict[str, list[Collective]]:
    """List the exchanges of one turn of each `while`, by the name of its body."""
    inside: dict[str, set[str]] = {}
    computation = ""
    for line in text.splitlines():
        opening = _COMPUTATION.match(line)
        if opening:
            computation = opening.group(2)
            inside.setdefault(computation, set())
        elif computation:
            names = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                names += [b.strip().lstrip("%") for b in branches.split(",")]
            inside[computation].update(names)
    every = collectives(text)
    return {
        body: [c for c in every if c.computation in _reached(body, inside)]
        for body in dict.fromkeys(_BODY.findall(text))
    }


def _reached(name: str, inside: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [name]
    while todo:
        now = todo.pop()
        if now not in seen:
            seen.add(now)
            todo += inside.get(now, ())
    return seen
