"""Translates the PTX that nvcc made of the kernels to C++ for the emulation's runtime.

Instruction by instruction: ``add.s64 %rd3, %rd1, 8;`` becomes ``set(rd3, add<s64>(rd1, 8))``, and
machine.h says what ``add`` does. An instruction that machine.h lacks fails to compile, with the
PTX's own line; an unknown form of statement raises UnsupportedPTX. The kernels are those of one
module, that is, of one translation unit that nvcc compiled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REGISTER_TYPES = {"pred", "b16", "b32", "b64", "f32", "f64"}
TYPES = REGISTER_TYPES | {f"{sign}{bits}" for sign in "us" for bits in (8, 16, 32, 64)}
TYPES |= {"b8", "f16", "bf16"}
# They say how a vector lies in a register list, or which cache to use: values don't depend on them.
WITHOUT_EFFECT = {"v2", "v4", "nc", "wb", "uni"}
WORDS_OF_CXX = {"and", "or", "xor", "not"}

SPECIAL_REGISTERS = {
    f"%{name}.{axis}": f"{variable}.{axis}"
    for name, variable in {
        "tid": "threadIdx",
        "ctaid": "blockIdx",
        "ntid": "blockDim",
        "nctaid": "gridDim",
    }.items()
    for axis in "xyz"
}

# For the C++ that comes out: PTX defines what C++ leaves to the compiler.
COMPILER_FLAGS = ["-w", "-fwrapv", "-ffp-contract=off"]


class UnsupportedPTX(ValueError):
    """The translation does not know such a statement."""


@dataclass(frozen=True)
class Shared:
    """A variable in shared memory; 0 bytes stand for the launch's dynamic memory."""

    name: str
    size: int


@dataclass(frozen=True)
class Statement:
    line: int
    text: str


@dataclass(frozen=True)
class Entry:
    """A kernel."""

    name: str
    parameter_bytes: list[int]
    max_threads: int
    body: list[Statement]


@dataclass(frozen=True)
class Module:
    path: Path
    shared: list[Shared]
    constants: dict[str, list[int]]  # bytes, such as those of an assertion's text
    entries: list[Entry]


# --- parsing

SHARED = re.compile(r"^(?:\.extern )?\.shared \.align \d+ \.b8 ([\w$]+)\[(\d*)\];", re.M)
CONSTANT = re.compile(r"^\.global \.align \d+ \.b8 ([\w$]+)\[\d+\] = \{([^}]*)\};", re.M)
ENTRY = re.compile(r"^\.visible \.entry (\w+)\(([^)]*)\)([^{]*)\{", re.M)
PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(\w+) \w+(?:\[(\d+)\])?")
TOKEN = re.compile(r"\{[^{};]*\}|[{};]|\$[\w$]+:")  # a vector's registers, a brace, an end, a label

# What else a module may hold: nothing that could change what a kernel does.
OTHERS = re.compile(
    r"\.version [\d.]+|\.target \w+|\.address_size 64"
    r"|\.global \.align \d+ \.b8 [\w$]+\[\d+\];|\.extern \.func __assertfail\s*\([^)]*\)\s*;"
)
DIRECTIVE = re.compile(r"\.(maxntid|reqntid|minnctapersm|maxnreg) ([\d, ]+)")


def parse(path: Path) -> Module:
    text = re.sub(r"//[^\n]*", "", path.read_text())
    constants = CONSTANT.findall(text)
    shared = [Shared(name, int(size or 0)) for name, size in SHARED.findall(text)]
    entries = []
    rest = text
    for match in ENTRY.finditer(text):
        end = end_of_block(text, match.end())
        entries.append(parse_entry(text, match, end))
        rest = rest.replace(text[match.start() : end], "", 1)
    for known in (SHARED, CONSTANT, OTHERS):
        rest = known.sub("", rest)
    if rest.strip() or not entries:
        raise UnsupportedPTX(f"{path}: {rest.strip()[:200] or 'there is no kernel'}")
    return Module(
        path=path,
        shared=shared,
        constants={name: [int(byte) for byte in data.split(",")] for name, data in constants},
        entries=entries,
    )


def end_of_block(text: str, start: int) -> int:
    depth = 1
    for match in re.compile("[{}]").finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.end()
    raise UnsupportedPTX("a kernel's end is missing")


def parse_entry(text: str, match: re.Match[str], end: int) -> Entry:
    name, parameters, directives = match.groups()
    return Entry(
        name=name,
        parameter_bytes=[
            int(count) if count else int(of_type[1:]) // 8
            for of_type, count in PARAMETER.findall(parameters)
        ],
        max_threads=max_threads(directives),
        body=list(parse_body(text, match.end(), end - 1)),
    )


def max_threads(directives: str) -> int:
    if unknown := DIRECTIVE.sub("", directives).strip():
        raise UnsupportedPTX(unknown)
    sizes = [size for name, size in DIRECTIVE.findall(directives) if name.endswith("ntid")]
    return min((math.prod(map(int, size.split(","))) for size in sizes), default=1024)


def parse_body(text: str, start: int, end: int) -> Iterator[Statement]:
    """The statements, labels and inner braces between these places."""
    line = text.count("\n", 0, start) + 1
    first = start
    for match in TOKEN.finditer(text, start, end):
        token = match.group()
        if token == "{" and text[first : match.start()].strip():
            raise UnsupportedPTX(f"line {line}: {text[first : match.end()]}")
        if token[0] == "{" and token[-1] == "}":
            continue
        statement = text[first : match.end()]
        line_of_it = line + statement[: len(statement) - len(statement.lstrip())].count("\n")
        yield Statement(line_of_it, " ".join(statement.split()).removesuffix(";").strip())
        line += statement.count("\n")
        first = match.end()
    if text[first:end].strip():
        raise UnsupportedPTX(f"line {line}: {text[first:end]}")


# --- translation


def cxx_name(name: str) -> str:
    """A register's name gets an underscore: there may be one named f32, as a type is."""
    if name.startswith("%"):
        return f"{name[1:]}_"
    return name.replace("$", "S_")


def operand(text: str) -> str:
    """A register, a number, or the address of a variable."""
    text = text.strip()
    if text in SPECIAL_REGISTERS:
        return SPECIAL_REGISTERS[text]
    if match := re.fullmatch(r"0f([0-9A-F]{8})", text):
        return f"float_of(0x{match.group(1)})"
    if match := re.fullmatch(r"0d([0-9A-F]{16})", text):
        return f"double_of(0x{match.group(1)})"
    if re.fullmatch(r"-?\d+", text):
        return f"s64({text}LL)" if text != str(-(2**63)) else "s64(1ULL << 63)"
    if re.fullmatch(r"%?[A-Za-z_$][\w$]*", text):
        return cxx_name(text)
    raise UnsupportedPTX(f"operand {text}")


def address(text: str) -> str:
    match = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", text)
    if match is None:
        raise UnsupportedPTX(f"address {text}")
    return f"{operand(match.group(1))} + s64({match.group(2) or 0})"


def split_operands(text: str) -> list[str]:
    return re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s{[][^,]*", text)


def elements(text: str) -> list[str]:
    """The operands of a vector of registers, or of a single one."""
    return [operand(element) for element in text.strip("{}").split(",")]


def name_and_types(opcode: str) -> tuple[str, str]:
    words = opcode.split(".")
    types = [word for word in words if word in TYPES]
    name = "_".join(word for word in words if word not in TYPES and word not in WITHOUT_EFFECT)
    return name + "_" * (name in WORDS_OF_CXX), ", ".join(types)


def declaration(text: str) -> str:
    if match := re.fullmatch(r"\.reg \.(\w+) (%?\w+)<(\d+)>", text):
        of_type, name, count = match.groups()
        names = [cxx_name(f"{name}{i}") for i in range(int(count))]
    elif match := re.fullmatch(r"\.(?:reg|param) \.(\w+) (%?\w+)", text):
        of_type, names = match.group(1), [cxx_name(match.group(2))]
    else:
        raise UnsupportedPTX(text)
    return f"{of_type} {', '.join(f'{name} = poison<{of_type}>()' for name in names)};"


def registers_of(opcode: str, text: str) -> str:
    """The registers of a vector, as many as the instruction says, or one."""
    registers = elements(text)
    vector = re.search(r"\.v(\d)\b", opcode)
    if len(registers) != (int(vector.group(1)) if vector else 1):
        raise UnsupportedPTX(f"{opcode} {text}")
    return ", ".join(registers)


def instruction(text: str) -> str:
    opcode, _, rest = text.partition(" ")
    operands = split_operands(rest)
    name, types = name_and_types(opcode)
    if name == "bra":
        (label,) = operands
        return f"goto {cxx_name(label)};"
    if name == "ret":
        return "return;"
    if name == "call" and rest.startswith("__assertfail"):
        return "assertion_failed(here(), param0);"
    if name == "trap":
        return 'fail("trap", here());'
    if name == "st_param":  # of such a call
        return store_of_argument(*operands)
    if name == "bar_sync":
        (barrier,) = operands
        return f"bar_sync(here(), {operand(barrier)});"
    if name.startswith("ld_"):
        registers, place = operands
        registers = registers_of(opcode, registers)
        return f"memory.{name}<{types}>(here(), {address(place)}, {registers});"
    if name.startswith("st_"):
        place, registers = operands
        registers = registers_of(opcode, registers)
        return f"memory.{name}<{types}>(here(), {address(place)}, {registers});"
    if name == "mov" and operands[1].startswith("{"):
        return f"pack({', '.join([operand(operands[0]), *elements(operands[1])])});"
    if name == "mov" and operands[0].startswith("{"):
        return f"unpack({', '.join([operand(operands[1]), *elements(operands[0])])});"
    sources = ", ".join(operand(source) for source in operands[1:])
    if name.startswith("shfl_sync"):
        result, inside = operands[0].split("|")
        return f"{name}<{types}>(here(), {operand(result)}, {operand(inside)}, {sources});"
    return f"set({operand(operands[0])}, {name}<{types}>({sources}));"


def store_of_argument(place: str, value: str) -> str:
    match = re.fullmatch(r"\[(param\d)\+0\]", place)
    if match is None:
        raise UnsupportedPTX(place)
    return f"{match.group(1)} = {operand(value)};"


def statement(text: str) -> str:
    if text in ("{", "}"):
        return text
    if text.endswith(":"):
        return f"{cxx_name(text)};"
    if text.startswith((".pragma", ".shared")):  # shared variables are the module's
        return ""
    if text.startswith("."):
        return declaration(text)
    if match := re.fullmatch(r"@(!?)(%p\d+) (.*)", text):
        negation, predicate, then = match.groups()
        return f"if ({negation}{cxx_name(predicate)}) {instruction(then)}"
    return instruction(text)


def translate_entry(entry: Entry, path: Path) -> Iterator[str]:
    yield f"void {entry.name}(std::span<const Parameter> parameters) {{"
    yield "[[maybe_unused]] const Memory memory{parameters, shared_variables};"
    for i in range(len(entry.parameter_bytes)):
        yield f"constexpr u64 {entry.name}_param_{i} = window_address({i + 1});"
    for part in entry.body:
        try:
            translated = statement(part.text)
        except (ValueError, TypeError, IndexError) as error:  # unknown operands
            raise UnsupportedPTX(f"{path}:{part.line}: {part.text}") from error
        yield f'#line {part.line} "{path.name}"'
        yield translated
    yield "}"
    sizes = ", ".join(map(str, entry.parameter_bytes))
    yield f'const Registration register_{entry.name}("{entry.name}", {entry.name},'
    yield f"    {{{sizes}}}, {entry.max_threads});"


def translate_some(module: Module, entries: list[Entry]) -> str:
    lines = ['#include "ptx/machine.h"', "namespace fastnn::cuda_emulation::ptx {", "namespace {"]
    variables = ", ".join(f'{{"{v.name}", {v.size}}}' for v in module.shared)
    lines.append(f"constexpr SharedVariable shared_variables[] = {{{{nullptr, 0}}, {variables}}};")
    for i, variable in enumerate(module.shared):
        lines.append(f"constexpr u64 {cxx_name(variable.name)} = window_address({i + 1});")
    for name, values in module.constants.items():
        numbers = ", ".join(map(str, values))
        lines.append(f"const unsigned char {cxx_name(name)}_data[] = {{{numbers}}};")
        lines.append(f"const u64 {cxx_name(name)} = reinterpret_cast<u64>({cxx_name(name)}_data);")
    for entry in entries:
        lines += translate_entry(entry, module.path)
    return "\n".join([*lines, "}", "}", ""])


STATEMENTS_PER_SOURCE = 15_000  # a minute of the compiler's time


def translate(path: Path) -> Iterator[str]:
    """C++ sources, each with some of the module's kernels."""
    module = parse(path)
    entries: list[Entry] = []
    for entry in module.entries:
        entries.append(entry)
        if sum(len(e.body) for e in entries) >= STATEMENTS_PER_SOURCE:
            yield translate_some(module, entries)
            entries = []
    if entries:
        yield translate_some(module, entries)
