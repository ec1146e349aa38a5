"""Reads compiled programs: which buffers, products and collectives they have, and how often each is executed.

XLA's own analysis counts a loop's body once. Here every instruction counts as often as its loops run.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

Shape = tuple[str, tuple[int, ...]]

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "token": 0, "opaque": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-~]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-~]+) = (.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|true_computation|false_computation)="
    r"\{?([^,}\s]+(?:, ?%[^,}\s]+)*)"
)
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_NO_BUFFER = (
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "constant",
)


@dataclass
class Instruction:
    """One instruction, and how often a run of the program executes it."""

    name: str
    opcode: str
    shapes: list[Shape]
    operands: list[str]
    text: str
    times: int = 0
    fused: bool = False


@dataclass
class Program:
    """The instructions of an optimised program, by computation."""

    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[dict[str, Instruction], Instruction]]:
        for computation in self.computations.values():
            for instruction in computation.values():
                if instruction.times:
                    yield computation, instruction

    def buffers(self) -> set[Shape]:
        """The shapes of all intermediate results that may be in memory (not those inside of a fusion)."""
        return {shape for _, i in self if not i.fused and i.opcode not in _NO_BUFFER for shape in i.shapes}

    def collectives(self) -> Counter:
        """Count how often each (kind, shape of the result) is executed."""
        found: Counter = Counter()
        gathers: dict[tuple, int] = {}
        for _, i in self:
            kind = i.opcode.removesuffix("-start")
            if kind not in _COLLECTIVES or i.opcode.endswith("-done"):
                continue
            shapes = [s for s in i.shapes if s[1]]
            if i.opcode == "all-gather-start":  # (operands, results)
                shapes = shapes[len(shapes) // 2 :]
            channel = re.search(r"channel_id=(\d+)", i.text)
            for shape, together in Counter(shapes).items():  # one instruction may gather several
                if kind == "all-gather" and channel:
                    # A TPU's program has one asynchronous gather in several fusions, which may lie in loops
                    # that run beside it. They have one channel, and it runs as often as the rarest of them.
                    key, times = ((kind, shape), channel.group(1)), together * i.times
                    gathers[key] = min(times, gathers.get(key, times))
                else:
                    found[kind, shape] += together * i.times
        for (gather, _), times in gathers.items():
            found[gather] += times
        return found

    def calls(self) -> Counter:
        """Count how often each custom call is executed: kernels, cuBLAS and so on."""
        found: Counter = Counter()
        for _, i in self:
            if i.opcode == "custom-call" and (target := re.search(r'custom_call_target="([^"]*)"', i.text)):
                found[target.group(1)] += i.times
        return found

    def products(self) -> Counter:
        """FLOPs of products (not of kernels), by the dtype of their left operand."""
        found: Counter = Counter()
        for computation, i in self:
            gemm = i.opcode == "custom-call" and "__cublas" in i.text
            dims = re.search(r"lhs_contracting_dim(?:ension)?s=?\"?:?[\[{]\"?([\d\",]*)", i.text)
            if not (i.opcode == "dot" or gemm) or dims is None:
                continue
            operand = computation.get(i.operands[0])
            if operand is None:
                continue
            dtype, left = operand.shapes[0]
            contracted = math.prod(left[int(d)] for d in re.findall(r"\d+", dims.group(1)))
            found[dtype] += i.times * 2 * math.prod(i.shapes[0][1]) * contracted
        for computation, i in self:
            if i.opcode != "convolution":  # what TPUs make of a product
                continue
            labels = re.search(r"dim_labels=(\w+)_(\w+)->", i.text)
            operand, weight = (computation.get(name) for name in i.operands[:2])
            if labels is None or operand is None or weight is None:
                continue
            into = weight.shapes[0][1][labels.group(2).index("i")]
            found[operand.shapes[0][0]] += i.times * 2 * math.prod(i.shapes[0][1]) * into
        return found


def size_of(shape: Shape) -> int:
    """Bytes of an array."""
    dtype, dims = shape
    bits = _BITS.get(dtype) if dtype in _BITS else int((re.search(r"\d+", dtype) or ["32"])[0])
    return math.prod(dims) * (bits or 0) // 8


def parse(text: str) -> Program:
    """Read the text of an optimised HLO module."""
    program, entry, current = Program(), "", {}
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = program.computations.setdefault(head.group(2), {})
            entry = head.group(2) if head.group(1) else entry
        elif found := _INSTRUCTION.match(line):
            name, rest = found.groups()
            if instruction := _instruction(name, rest):
                current[name] = instruction
    _count(program, entry, 1, False)
    return program


def _instruction(name: str, rest: str) -> Instruction | None:
    if rest.startswith("("):  # a tuple
        depth = accumulate((c == "(") - (c == ")") for c in rest)
        end = next(index for index, open_ in enumerate(depth) if not open_) + 1
        result, rest = rest[:end], rest[end + 1 :]
    else:
        result, _, rest = rest.partition(" ")
    call = re.match(r"([\w\-]+)\((.*)", rest)
    if call is None:
        return None
    result = re.sub(r"\{[^}]*\}", "", result)
    shapes = [
        (dtype, tuple(int(d) for d in dims.split(",") if d))
        for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,]*)\]", result)
    ]
    operands = re.findall(r"%([\w.\-~]+)", call.group(2).split("), ")[0])
    return Instruction(name, call.group(1), shapes, operands, rest)


def _count(program: Program, computation: str, times: int, fused: bool) -> None:
    for i in program.computations.get(computation, {}).values():
        i.times += times
        i.fused = fused
        inside = fused or i.opcode == "fusion"
        runs = times * (_trips(program, i.text) if i.opcode == "while" else 1)
        if i.opcode in ("while", "fusion", "call", "conditional", "async-start"):
            for called in _CALLED.findall(i.text):
                for name in re.findall(r"[\w.\-~]+", called):
                    _count(program, name, runs, inside)


def _trips(program: Program, text: str) -> int:
    """Return the number of times that a loop runs: as XLA says, or else the only integer constant in its
    condition; else 1."""
    if known := re.search(r'known_trip_count"?:\{"n":"?(\d+)', text):
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-~]+)", text)
    inside = program.computations.get(condition.group(1), {}) if condition else {}
    bounds = {
        int(n)
        for i in inside.values()
        if i.opcode == "constant" and i.shapes and i.shapes[0][0] == "s32"
        for n in re.findall(r"constant\((\d+)\)", i.text)
    }
    return bounds.pop() if len(bounds) == 1 else 1
