"""Decodes an uploaded custom loss, the graph of a traced torch function, into checked data.

The graph is JSON, `{"format": 1, "nodes": [...]}`, as `torch.fx` records and the SDK encodes it. Nothing in
it is executable: names are keys into fixed tables (`operations`). Its size is bounded here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from .dtypes import DTYPES

MAX_NODES = 512
MAX_CONSTANTS = 8192  # numbers and words in all arguments together
MAX_DEPTH = 8  # nesting of lists in an argument
MAX_WORD = 128  # characters

_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class CustomLossError(ValueError):
    """The graph is not a valid custom loss, or cannot be computed for a datum. The message names the node."""


@dataclass(frozen=True)
class Ref:
    """A reference, within an argument, to the value of an earlier node."""

    node: str


class Placement:
    """A device, layout or memory format, which is ignored."""


PLACEMENT = Placement()


@dataclass(frozen=True)
class Node:
    """One node.

    Arguments are Refs, numbers, strings, None, Ellipsis, slices, dtypes, or lists, tuples and dicts of
    these."""

    op: str  # placeholder, call_function or call_method
    name: str
    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        return f"node {self.name!r} ({self.target})"


@dataclass(frozen=True)
class Graph:
    """The nodes in the order of execution, and the names of those that give the loss and the metrics."""

    inputs: tuple[tuple[str, int], ...]  # name and rank, `logprobs` first
    nodes: tuple[Node, ...]
    loss: str
    metrics: dict[str, str]  # node by the metric's name


def decode(
    data: bytes, inputs: Sequence[tuple[str, int]], functions: Container[str], methods: Container[str]
) -> Graph:
    """Decode a graph. Raises CustomLossError if it calls anything that is not in the tables."""
    try:
        graph = json.loads(data)
    except (ValueError, RecursionError):
        raise CustomLossError("graph: not JSON, or nested too deeply") from None
    if not isinstance(graph, dict) or graph.get("format") != 1 or not isinstance(graph.get("nodes"), list):
        raise CustomLossError('graph: must be {"format": 1, "nodes": [...]}')
    nodes = graph["nodes"]
    if not 1 <= len(nodes) <= MAX_NODES:
        raise CustomLossError(f"graph: {len(nodes)} nodes; a custom loss has 1 to {MAX_NODES}")
    decoder = _Decoder(functions, methods)
    checked = [decoder.node(node, index) for index, node in enumerate(nodes[:-1])]
    names = [node.target for node in checked if node.op == "placeholder"]
    if names != [name for name, _ in inputs]:
        raise CustomLossError(
            f"graph: its placeholders are {names}, its inputs {[name for name, _ in inputs]}"
        )
    loss, metrics = decoder.output(nodes[-1])
    return Graph(tuple(inputs), tuple(checked), loss, metrics)


class _Decoder:
    """Decodes the nodes of one graph. A node may refer to nodes before it."""

    def __init__(self, functions: Container[str], methods: Container[str]):
        self._tables = {"call_function": functions, "call_method": methods}
        self._names: set[str] = set()
        self._constants = 0

    def node(self, node: Any, index: int) -> Node:
        op, name, target, args, kwargs = _fields(node, index)
        where = f"node {name!r} ({target})"
        if name in self._names:
            raise CustomLossError(f"{where}: a second node of that name")
        if op in self._tables:
            if target not in self._tables[op]:
                kind = "function" if op == "call_function" else "tensor method"
                raise CustomLossError(f"{where}: {target!r} is not a {kind} that custom losses may call here")
        elif op != "placeholder":
            raise CustomLossError(f"{where}: {op} nodes cannot be in a custom loss")
        checked = Node(
            op,
            name,
            target,
            tuple(self._argument(arg, where, 0) for arg in args),
            {key: self._argument(arg, where, 0) for key, arg in kwargs.items()},
        )
        self._names.add(name)
        return checked

    def output(self, node: Any) -> tuple[str, dict[str, str]]:
        op, name, target, args, _ = _fields(node, -1)
        where = f"node {name!r} ({target})"
        if op != "output" or len(args) != 1:
            raise CustomLossError(f"{where}: the last node must be the output, of one argument")
        result = self._argument(args[0], where, 0)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise CustomLossError(f"{where}: a custom loss returns (loss, metrics)")
        loss, metrics = result
        if not isinstance(loss, Ref):
            raise CustomLossError(f"{where}: the loss must be a tensor")
        if not isinstance(metrics, dict):
            raise CustomLossError(f"{where}: the metrics must be a dict")
        for key, value in metrics.items():
            if not _METRIC.fullmatch(key) or not isinstance(value, Ref):
                raise CustomLossError(
                    f"{where}: metric {key!r} must be named custom/<name>:sum or custom/<name>:mean, "
                    "in lower case, and be a tensor"
                )
        return loss.node, {key: value.node for key, value in metrics.items()}

    def _argument(self, value: Any, where: str, depth: int) -> Any:
        self._constants += 1
        if self._constants > MAX_CONSTANTS:
            raise CustomLossError(f"{where}: the arguments of the graph hold over {MAX_CONSTANTS} constants")
        if depth > MAX_DEPTH:
            raise CustomLossError(f"{where}: an argument is nested deeper than {MAX_DEPTH}")
        match value:
            case None | bool():
                return value
            case int() if -(1 << 63) <= value < 1 << 63:
                return value
            case float() if math.isfinite(value):
                return value
            case str() if len(value) <= MAX_WORD:
                return value
            case list():
                return [self._argument(each, where, depth + 1) for each in value]
            case dict() if len(value) == 1:
                ((kind, content),) = value.items()
                return self._encoded(kind, content, where, depth)
        raise CustomLossError(f"{where}: an argument is not one that custom losses have")

    def _encoded(self, kind: str, content: Any, where: str, depth: int) -> Any:
        match kind, content:
            case "ref", str():
                if content not in self._names:
                    raise CustomLossError(f"{where}: {content!r} is not the name of an earlier node")
                return Ref(content)
            case "tuple", list():
                return tuple(self._argument(each, where, depth + 1) for each in content)
            case "dict", dict():
                return {key: self._argument(each, where, depth + 1) for key, each in content.items()}
            case "slice", [_, _, _]:
                return slice(*(self._argument(each, where, depth + 1) for each in content))
            case "ellipsis", True:
                return Ellipsis
            case "float", "inf" | "-inf" | "nan":
                return _FLOATS[content]
            case "dtype", str() if content in DTYPES:
                return jnp.dtype(DTYPES[content])
            case "device" | "layout" | "memory_format", str():
                return PLACEMENT
        raise CustomLossError(f"{where}: an argument {kind!r} is not one that custom losses have")


def _fields(node: Any, index: int) -> tuple[str, str, str, list[Any], dict[str, Any]]:
    """Return op, name, target, args and kwargs, checked for their types."""
    if not isinstance(node, dict):
        raise CustomLossError(f"graph: nodes[{index}] is not an object")
    words = [node.get(key) for key in ("op", "name", "target")]
    args, kwargs = node.get("args", []), node.get("kwargs", {})
    if not all(isinstance(word, str) and 1 <= len(word) <= MAX_WORD for word in words):
        raise CustomLossError(
            f"graph: nodes[{index}] must have op, name and target, of 1 to {MAX_WORD} characters"
        )
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise CustomLossError(f"graph: nodes[{index}] must have a list of args and an object of kwargs")
    op, name, target = words
    return str(op), str(name), str(target), args, kwargs
