"""Bytes that a compiled program moves to and from the memory of a chip (HBM), from the program's text.

XLA's "bytes accessed" counts operands and results of every operation, also those that stay in the memory
inside of a TPU core (VMEM, memory space 1 in the text). Here an array is counted where an operation of the
program reads it from HBM or writes it to HBM:

- fusions, products, reductions and collectives: their operands and results in HBM. An operand that a fusion
  only slices counts with the size of the slices.
- copies and slices: the bytes that they move, once for each side that lies in HBM. Of an asynchronous pair
  the start counts, the end does not.
- loops: their bodies, times the trip count that the compiler found or that their condition compares with. An
  array that an operation updates in place counts with the size of the update.

Sizes are those of the values, without the padding of tiles.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64}
SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
LINE = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][\w\-]*)\((.*)$")
NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "iota",
}  # fmt: skip
MOVES = {"copy", "copy-start", "slice", "slice-start", "dynamic-slice", "async-start"}
SLICES = {"slice", "dynamic-slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Operation:
    """A line of a computation.

    Attributes:
      name: its name in the program.
      kind: such as "fusion".
      result: the text of its result's type.
      operands: names of its operands.
      text: what follows the operands: called computations, metadata.
    """

    name: str
    kind: str
    result: str
    operands: tuple[str, ...]
    text: str


Computations = dict[str, dict[str, Operation]]  # name of a computation -> name of an operation -> it


def hbm_traffic(text: str) -> collections.Counter[str]:
    """Bytes read and written in HBM by one execution of a program on one chip, by source.

    Args:
      text: of `jax.stages.Compiled.as_text()`.

    Returns:
      The source of operations, "attention, backward", -> bytes.
    """
    computations = _computations(text)
    entry = re.search(r"^ENTRY %?(\S+)", text, re.MULTILINE)
    if entry is None:
        raise ValueError("The text is not a compiled program: it has no ENTRY computation.")
    found: collections.Counter[str] = collections.Counter()
    frames = _functions(text)
    for operation, own, times in _executed(computations, entry[1], 1):
        if moved := _bytes(operation, own, computations):
            found[_source(operation, own, frames)] += times * moved
    return found


def loop_counts(text: str) -> dict[str, int]:
    """How often each computation of a program runs because of the loops that it is in.

    Args:
      text: of `jax.stages.Compiled.as_text()`.

    Returns:
      The name of a computation -> the product of the trip counts of its loops, 1 outside of loops.
    """
    computations = _computations(text)
    found = dict.fromkeys(computations, 1)

    def visit(name: str, times: int) -> None:
        found[name] = max(found[name], times)
        for operation in computations[name].values():
            inside = times * (_trip_count(computations, operation) if operation.kind == "while" else 1)
            for called in set(re.findall(r"(?:calls|body|to_apply)=%([\w.\-]+)", operation.text)):
                if called in computations:
                    visit(called, inside)

    entry = re.search(r"^ENTRY %?(\S+)", text, re.MULTILINE)
    if entry and entry[1] in computations:
        visit(entry[1], 1)
    return found


def _executed(
    computations: Computations, name: str, times: int
) -> Iterator[tuple[Operation, dict[str, Operation], int]]:
    """(operation, its computation, how often it runs) of a computation and of the loops in it."""
    for operation in computations[name].values():
        if operation.kind == "while":
            body = re.search(r"body=%([\w.\-]+)", operation.text)
            if body:
                yield from _executed(computations, body[1], times * _trip_count(computations, operation))
        elif operation.kind in ("call", "conditional"):
            for called in re.findall(r"(?:to_apply|branch_computations=\{|, )=?%([\w.\-]+)", operation.text)[
                :1
            ]:
                yield from _executed(computations, called, times)
        else:
            yield operation, computations[name], times


def _trip_count(computations: Computations, loop: Operation) -> int:
    """How often a loop runs: as the compiler wrote, or the only integer constant of its condition; else 1."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.text):
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", loop.text)
    inside = computations.get(condition[1], {}) if condition else {}
    limits = [o.text.partition(")")[0] for o in inside.values() if o.kind == "constant"]
    limits = [int(limit) for limit in limits if limit.isdecimal()]
    return limits[0] if len(limits) == 1 else 1


def _bytes(operation: Operation, own: dict[str, Operation], computations: Computations) -> int:
    """Bytes that an operation of the computation `own` moves in HBM."""
    types = [own[name].result for name in operation.operands if name in own]
    if operation.kind in NO_TRAFFIC or operation.kind.endswith("-done"):
        return 0
    if re.search("ConcatBitcast|AllocateBuffer", operation.text):
        return 0
    if operation.kind == "dynamic-update-slice":
        return _size(types[1]) * (_in_hbm(types[1]) + _in_hbm(operation.result))
    if operation.kind in MOVES:
        destination, source = _ends(operation, types)
        moved = _size(destination)
        return moved * (_in_hbm(destination) + _in_hbm(source))
    inside = _called(operation, computations)
    read = sum(
        _in_hbm(kind) * (_read(inside, number, computations) if inside else _size(kind))
        for number, types_of in enumerate(types)
        for kind in _parts(types_of)
    )
    results = _written(inside, computations) if inside else []
    parts = _parts(operation.result)
    if len(results) != len(parts):
        results = [_size(part) for part in parts]
    return read + sum(_in_hbm(part) * size for part, size in zip(parts, results, strict=True))


def _ends(operation: Operation, types: list[str]) -> tuple[str, str]:
    """The types of the destination and the source of a copy or slice."""
    parts = _parts(operation.result)
    if operation.kind == "copy-start":  # (destination, source, context)
        return parts[0], parts[1]
    if operation.kind in ("slice-start", "async-start"):  # ((source), destination, context)
        return parts[1], parts[0]
    return parts[0], types[0] if types else parts[0]


def _called(operation: Operation, computations: Computations) -> dict[str, Operation]:
    """The operations of a fusion; empty for other operations."""
    called = re.search(r"calls=%([\w.\-]+)", operation.text)
    return computations.get(called[1], {}) if called and operation.kind == "fusion" else {}


def _read(inside: dict[str, Operation], number: int, computations: Computations) -> int:
    """Bytes that a fusion reads of its operand `number`: of an operand that it only slices, the slices."""
    (parameter,) = (
        o for o in inside.values() if o.kind == "parameter" and int(o.text.partition(")")[0]) == number
    )
    return _read_of(parameter, inside, computations)


def _read_of(array: Operation, inside: dict[str, Operation], computations: Computations) -> int:
    """Bytes of an array that the operations of a fusion read."""
    total = 0
    for user in inside.values():
        for position in (i for i, name in enumerate(user.operands) if name == array.name):
            if user.kind in SLICES and position == 0:
                total += _size(user.result)
            elif user.kind == "bitcast":
                total += _read_of(user, inside, computations)
            elif user.kind == "fusion":
                total += _read(_called(user, computations), position, computations)
            elif user.kind != "dynamic-update-slice" or position > 0:  # which keeps the rest of its operand
                total += _size(array.result)
    return min(total, _size(array.result))


def _written(inside: dict[str, Operation], computations: Computations) -> list[int]:
    """Bytes of each result that a fusion writes: of an array that it updates, the updated part."""
    root = next(reversed(inside.values()))
    results = [inside[name] for name in root.operands] if root.kind == "tuple" else [root]
    sizes = []
    for result in results:
        while result.kind == "bitcast" and result.operands[0] in inside:
            result = inside[result.operands[0]]
        if result.kind == "dynamic-update-slice":
            sizes.append(_size(inside[result.operands[1]].result))
        elif result.kind == "fusion" and len(_parts(result.result)) == 1:
            sizes += _written(_called(result, computations), computations)
        else:
            sizes.append(_size(result.result))
    return sizes


def _computations(text: str) -> Computations:
    computations: Computations = {}
    current: dict[str, Operation] = {}
    for line in text.splitlines():
        if head := re.match(r"^(?:ENTRY )?%?(\S+) \(.*\{$", line):
            current = computations[head[1]] = {}
        elif found := LINE.match(line):
            name, result, kind, rest = found.groups()
            inside = rest.partition(")")[0] if kind != "parameter" else ""
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            current[name] = Operation(name, kind, result, operands, rest)
    return computations


def _parts(kind: str) -> list[str]:
    """The arrays of a type, which may be a tuple."""
    return [found[0] for found in SHAPE.finditer(kind)]


def _size(kind: str) -> int:
    """Bytes of an array type such as bf16[128,197,384]{2,1,0}."""
    found = SHAPE.search(kind)
    if found is None:
        return 0
    bits = BITS.get(found[1]) or int(re.sub(r"\D", "", found[1]) or 0)
    count = 1
    for side in filter(None, found[2].split(",")):
        count *= int(side)
    return count * bits // 8


def _in_hbm(kind: str) -> bool:
    """Whether an array lies in HBM: memory space 0, which is not written."""
    return not re.search(r"S\([1-9]\)", kind)


def _functions(text: str) -> dict[int, list[str]]:
    """Number of a stack frame -> names of its functions, innermost first."""
    tables: dict[str, dict[int, str]] = {}
    for title in ("FunctionNames", "FileLocations", "StackFrames"):
        block = re.search(rf"^{title}\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
        rows = [line.partition(" ") for line in block[1].splitlines()] if block else []
        tables[title] = {int(number): rest for number, _, rest in rows if number.isdigit()}
    value = lambda row, name: int((re.search(rf"{name}=(\d+)", row) or [0, 0])[1])

    def chain(frame: int) -> list[str]:
        names: list[str] = []
        while frame in tables["StackFrames"] and len(names) < 50:
            row = tables["StackFrames"][frame]
            location = tables["FileLocations"].get(value(row, "file_location_id"), "")
            names.append(tables["FunctionNames"].get(value(location, "function_name_id"), '""').strip('"'))
            frame = value(row, "parent_frame_id") - 1  # counted from 1; 1: no parent
        return names

    return {frame: chain(frame) for frame in tables["StackFrames"]}


def _source(operation: Operation, computation: dict[str, Operation], frames: dict[int, list[str]]) -> str:
    """The function that an operation comes from, and whether it is part of the backward pass.

    Copies and slices that the compiler added are named after what they move.
    """
    name = re.search(r'op_name="([^"]*)"', operation.text)
    if name is None and operation.operands and operation.operands[0] in computation:
        kind = operation.kind.partition("-")[0] if operation.kind in MOVES else ""
        moved = _source(computation[operation.operands[0]], computation, frames)
        return moved if not kind or moved.startswith(f"{kind} of ") else f"{kind} of {moved}"
    if operation.kind == "parameter":
        return re.split(r"[.\[]", name[1] if name else operation.name)[0] + " (an argument)"
    frame = re.search(r"stack_frame_id=(\d+)", operation.text)
    functions = frames.get(int(frame[1]), []) if frame else []
    source = functions[0] if functions else name[1].rpartition("/")[2] if name else operation.kind
    return source + (", backward" if name and "transpose(" in name[1] else "")
