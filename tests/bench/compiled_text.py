"""Reads compiled programs: what they run one after another, and what that moves.

An instruction of the entry computation is a kernel, whatever is fused in it. Exact and free of
noise, but it is the compiler's view: nothing is run. Checked with JAX 0.10.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

SIZES = {
    **{"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2},
    **{"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16},
}
ARRAY = re.compile(rf"\b({'|'.join(SIZES)})\[([\d,]*)\]")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-start", "copy-done"}

COLLECTIVES = {"all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"}


class Instruction(NamedTuple):
    """`operands` are names and types; of one that is a tuple the type is left out."""

    name: str
    type: str
    opcode: str
    operands: list[tuple[str, str]]
    line: str


Program = dict[str, list[Instruction]]  # of each computation; the entry's name is ENTRY


def arrays(kind: str) -> list[tuple[int, int]]:
    """(elements, bytes) of each array in a type."""
    counts = [(t, math.prod(map(int, filter(None, n.split(","))))) for t, n in ARRAY.findall(kind)]
    return [(n, n * SIZES[t]) for t, n in counts]


def read(text: str) -> Program:
    """The computations of a program in XLA's text form."""
    program: Program = {}
    for found in re.finditer(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\n((?:  .*\n)*)\}", text, re.MULTILINE):
        program["ENTRY" if found[1] else found[2]] = list(_instructions(found[3]))
    return program


def _instructions(body: str) -> Iterator[Instruction]:
    types: dict[str, str] = {}
    for line in body.splitlines():
        name, rest = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)", line).groups()
        end = _type_end(rest)
        types[name] = re.sub(r"\{[^{}]*\}", "", rest[:end])  # without layouts
        opcode, operands = re.match(r" ([\w\-]+)\((.*?)\)", rest[end:]).groups()
        read = [(n, types.get(n, "")) for n in re.findall(r"%([\w.\-]+)", operands)]
        whole = [(n, "" if t.startswith("(") else t) for n, t in read]
        yield Instruction(name, types[name], opcode, whole, line)


def _type_end(text: str) -> int:
    """Where the type ends that the text begins with: a tuple's has spaces."""
    if not text.startswith("("):
        return text.index(" ")
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"No end of a type in {text!r}.")


def kernels(program: Program, computation: str = "ENTRY") -> list[Instruction]:
    return [i for i in program[computation] if i.opcode not in FREE]


def fused(program: Program, instruction: Instruction) -> list[Instruction]:
    """What an instruction is made of, down to the bottom; the branches of a conditional are not."""
    inner = [i for name in _called(instruction) for i in program[name]]
    return inner + [j for i in inner for j in fused(program, i)]


def _called(instruction: Instruction) -> list[str]:
    return re.findall(r"\bcalls=%?([\w.\-]+)", instruction.line)


def moved(program: Program, instruction: Instruction) -> list[tuple[int, int]]:
    """(elements, bytes) of each array that it reads or writes; a slice if it reads no more."""
    inside = [i for name in _called(instruction) for i in program[name]]
    inputs = {
        i.line.split("parameter(")[1].split(")")[0]: i.name
        for i in inside
        if i.opcode == "parameter"
    }
    types = [instruction.type]
    for number, (_, kind) in enumerate(instruction.operands):
        name = inputs.get(str(number))
        uses = [i for i in inside if name in dict(i.operands)]
        sliced = uses and all(i.opcode == "slice" for i in uses)
        types += [i.type for i in uses] if sliced else [kind]
    return [a for t in types for a in arrays(t)]


def passes(program: Program, instruction: Instruction, elements: int) -> int:
    """How many arrays of so many elements or more it reads and writes."""
    return sum(n >= elements for n, _ in moved(program, instruction))


def _is_tiny(instruction: Instruction, elements: int) -> bool:
    """Whether it has to do with no array of so many elements, nor with a slice of one."""
    types = instruction.type, *(kind for _, kind in instruction.operands)
    return all(n < elements for kind in types for n, _ in arrays(kind))


def sums(program: Program, elements: int) -> tuple[int, int]:
    """Kernels that sum a large array into a vector: with a convolution in them, and all others."""
    with_convolution = alone = 0
    for kernel in kernels(program):
        parts = [kernel, *fused(program, kernel)]
        if any(p.opcode == "reduce" and _is_sum(p, elements) for p in parts):
            fuses = any(p.opcode == "convolution" for p in parts)
            with_convolution, alone = with_convolution + fuses, alone + (not fuses)
    return with_convolution, alone


def _is_sum(reduce: Instruction, elements: int) -> bool:
    """Whether all axes but one are reduced, as batch normalization does."""
    vector = all("," not in dims for _, dims in ARRAY.findall(reduce.type))
    return vector and any(n >= elements for _, kind in reduce.operands for n, _ in arrays(kind))


def collectives(program: Program) -> dict[str, int]:
    """How many of each there are, and of what, but for those that a branch has to itself."""
    found = Counter[str]()
    for kernel in program["ENTRY"]:
        for i in (kernel, *fused(program, kernel)):
            name = i.opcode.removesuffix("-start")
            if name in COLLECTIVES:
                found[
                    f"{name} of {' and '.join(sorted({t for t, _ in ARRAY.findall(i.type)}))}"
                ] += 1
    return dict(found)


def figures(compiled: Any, elements: int) -> dict[str, Any]:
    """What a compiled program moves and holds; arrays of so many elements or more count as passes.

    Where a convolution is a call into a library (on a GPU) its bytes are not among them.
    """
    program = read(compiled.as_text())
    ran = kernels(program)
    branching = [i for i in ran if i.opcode == "conditional"]
    accessed = _bytes_accessed(compiled)
    idle = sum(_moved_by_branches(program, i) for i in branching)
    cycles = [int(c) for i in ran for c in re.findall(r'"estimated_cycles":"?(\d+)', i.line)]
    epilogues, alone = sums(program, elements)
    return {
        "bytes": accessed,
        "quiet_bytes": accessed - idle,
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": len(ran),
        "tiny": sum(_is_tiny(i, elements) for i in ran),
        "passes": sum(passes(program, i, elements) for i in ran if i not in branching),
        "cycles": sum(cycles),
        "conditionals": len(branching),
        "epilogues": epilogues,
        "sums_alone": alone,
    }


def branches(program: Program, conditional: Instruction) -> list[list[Instruction]]:
    """The kernels of each branch."""
    (names,) = re.findall(r"\bbranch_computations=\{(.*?)\}", conditional.line) or [
        ", ".join(re.findall(r"\b(?:true|false)_computation=(%?[\w.\-]+)", conditional.line))
    ]
    return [kernels(program, name) for name in re.findall(r"[\w.\-]+", names)]


def _moved_by_branches(program: Program, conditional: Instruction) -> int:
    """Bytes that the analysis counts, but that the shorter branch does not move."""
    of_branches = [
        sum(size for i in branch for _, size in moved(program, i))
        for branch in branches(program, conditional)
    ]
    return max(of_branches) - min(of_branches)


def _bytes_accessed(compiled: Any) -> float:
    """By XLA's cost analysis, which a program compiled without its card has to be handed to."""
    try:
        return compiled.cost_analysis()["bytes accessed"]
    except (NotImplementedError, TypeError):
        import jax
        from jax._src.lib import xla_client

        (module,) = compiled.runtime_executable().hlo_modules()
        cpu = jax.devices("cpu")[0].client
        return xla_client._xla.hlo_module_cost_analysis(cpu, module)["bytes accessed"]
