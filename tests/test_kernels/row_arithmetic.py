"""Reads from PTX what an attention kernel computes of a row for one tile of keys, so that two kernels can be compared.

Each float instruction becomes an expression over the scores, named by their column's place in the product's output (register
i of a thread's row, in the order of columns), and over unknowns "?" (the row's maximum and sum so far, the scale). Choosing
between a score and -inf counts as the score. The order of additions and of exchanges between lanes, and which multiplications
and additions round once, all show."""

import re

_OPERATIONS = {"add.f32": "add", "sub.f32": "sub", "mul.f32": "mul", "max.f32": "max", "neg.f32": "neg", "fma.rn.f32": "fma",
               "ex2.approx.ftz.f32": "ex2", "ex2.approx.f32": "ex2", "selp.f32": "selp", "shfl.sync.bfly.b32": "shfl"}
_COMMUTE = {"add": 2, "mul": 2, "max": 2, "fma": 2}  # how many of the first operands may swap


def _products(registers: dict[str, str], outputs: list[str], line: str, columns: int) -> None:
    """Names the outputs of a product; those of mma.sync, one tile of 8 columns each, join `outputs` in the order of tiles,
    which run along a row first."""
    written = re.findall(r"%\w+", line[line.index("{"):line.index("}")])
    if "wgmma" in line:
        outputs[:] = written
    elif written[0] not in outputs:
        outputs += written
    # of each four: columns c and c + 1 of a row, then of the row 8 below
    for place, name in enumerate(outputs):
        rows, column = divmod(place, 2 * columns)
        registers[name] = f"s{rows * 2 + place % 4 // 2}.{column // 4 * 2 + place % 2}"


def _is_constant(operand: str) -> bool:
    return operand.startswith("0f")


def row_updates(ptx: str, columns: int) -> set[str]:
    """What a tile of 4 * `columns` keys does to a row: its weights' exponents, one expression per column of a thread, the sum
    of its weights, and the factor on its output; and how a part is added; one set where all rows and loops of the kernel
    agree."""
    registers, outputs, updates = {}, [], set()
    for line in map(str.strip, ptx.splitlines()):
        if line.startswith("$L__BB"):
            registers, outputs = {}, []
        elif line.startswith(("mma.sync", "wgmma.mma_async")):
            _products(registers, outputs, line, columns)
        elif (found := re.match(r"(\S+)\s+(%\w+), (.*);", line)) and found[1] in _OPERATIONS:
            operation, target = _OPERATIONS[found[1]], found[2]
            operands = [registers.get(operand, "?" if operand.startswith("%") else operand) for operand in found[3].split(", ")]
            if operation == "selp":  # of two, one is a constant
                registers[target] = next((operand for operand in operands if not _is_constant(operand)), operands[0])
                continue
            count = _COMMUTE.get(operation, 0)
            registers[target] = f"{operation}({', '.join(sorted(operands[:count]) + operands[count:])})"
            adds_sums = operation == "fma" and ("shfl" in operands[2] or "ex2(" in operands[2])
            is_factor = operation == "mul" and "ex2(" in registers[target] and not any(map(_is_constant, operands))  # else a log2
            if adds_sums or is_factor:
                rows = set(re.findall(r"s(\d)\.", registers[target]))  # none where a part is added
                assert len(rows) <= 1, f"{len(rows)} rows meet in {registers[target]}"
                updates.add(re.sub(r"s\d\.", "s", registers[target]))
        elif (found := re.match(r"\S+\s+(%\w+),", line)) and found[1] in registers and not line.startswith(("st.", "red.")):
            del registers[found[1]]
    return updates
