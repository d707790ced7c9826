"""Launch scripts: the words of their commands and arrays, with the variables that the file itself sets.

No shell runs: comments, line continuations, quotes, NAME=value, arrays, ${NAME}, ${NAME:-default} and $((arithmetic)) are
understood; anything else stays as it is written, and what needs a number then says so.
"""
import ast
import operator
import re
import shlex

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
              ast.Div: operator.truediv}
_ARRAY = re.compile(r"^[ \t]*(\w+)\+?=\((.*?)(?:(?<=\s)\)[ \t]*#[^\n]*|\)[ \t]*)$", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"^\s*(?:(?:export|local|readonly)\s+)?(\w+)=(.*)$")


def words_of(text: str) -> list[str]:
    """The words of all arrays and commands, in order, variables filled in; "--" ends each array and each command."""
    variables, arrays = {"HOME": "~"}, list[str]()
    lines = re.sub(r"\\\n", " ", _ARRAY.sub(lambda match: _kept(match, arrays), text)).splitlines()
    commands = []
    for line in lines:
        if (match := _ASSIGNMENT.match(line)) and len(parts := _split("x=" + expand(match[2], variables))) == 1:
            variables[match[1]] = parts[0][2:]
        else:
            commands.append(line)
    words = []
    for line in [*arrays, *commands]:
        words += [word for word in _split(expand(line, variables)) if not re.fullmatch(r"\$\{\w+\[@\]\}", word)]
        words.append("--")
    return words


def flags_of(words: list[str]) -> dict[str, object]:
    """--name value, --name=value and --name alone (true) of the words; a name with several values has a list."""
    found: dict[str, object] = {}
    name, values = None, []
    for word in [*words, "--"]:  # a bare "--" ends what came before
        if not word.startswith("--"):
            values.append(word)
            continue
        if name is not None:
            found[name] = True if not values else values[0] if len(values) == 1 else values
        name, _, value = word[2:].partition("=")
        name, values = name or None, [value] if value else []
    return found


def expand(word: str, variables: dict[str, str]) -> str:
    """The word with its variables and arithmetic filled in, as far as they are known."""
    for _ in range(8):  # variables of variables
        before = word
        word = re.sub(r"\$\{(\w+)(?::?[-=]([^{}]*))?\}|\$(\w+)", lambda match: _value(match, variables), word)
        word = re.sub(r"\$\(\(([^()$]*)\)\)", lambda match: _arithmetic(match, variables), word)
        if word == before:
            break
    return word


def _kept(match: re.Match, arrays: list[str]) -> str:
    arrays.append(" ".join(re.sub(r"(^|\s)#.*", "", line) for line in match[2].splitlines()))
    return ""


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quote that goes over several lines, as in JSON for a launcher
        return []


def _value(match: re.Match, variables: dict[str, str]) -> str:
    name = match[1] or match[3]
    return variables[name] if name in variables else match[2] if match[2] is not None else match[0]


def _arithmetic(match: re.Match, variables: dict[str, str]) -> str:
    text = re.sub(r"[A-Za-z_]\w*", lambda name: variables.get(name[0], name[0]), match[1])
    try:
        return str(calculate(ast.parse(text.strip(), mode="eval").body, {}))
    except (SyntaxError, ValueError):
        return match[0]


def calculate(node: ast.expr, names: dict[str, object]) -> object:
    """The value of a literal, of a name with a known one, or of their arithmetic. Raises ValueError for anything else."""
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = calculate(node.left, names), calculate(node.right, names)
        is_division = isinstance(node.op, (ast.Div, ast.FloorDiv))
        if isinstance(left, (int, float)) and isinstance(right, (int, float)) and not (is_division and right == 0):
            return _OPERATORS[type(node.op)](left, right)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError) as error:
        raise ValueError(f"{ast.unparse(node)} is not known before the program runs") from error
