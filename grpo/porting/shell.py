"""Launch scripts: the words of their commands, with the variables and arrays that the file itself sets.

No shell runs: comments, line continuations, quotes, NAME=value, arrays, ${NAME}, ${NAME:-default} and $((arithmetic)) are
understood, also over several lines; here-documents are left out. Anything else stays as it is written, and what needs a number
then says so.
"""
import ast
import operator
import re

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
              ast.Div: operator.truediv}
_HERE_DOCUMENT = re.compile(r"(?<!<)<<(?!<)-?[ \t]*([\"']?)(\w+)\1([^\n]*)\n.*?^[ \t]*\2[ \t]*$", re.MULTILINE | re.DOTALL)
_BEFORE_ASSIGNMENTS = ("export", "local", "readonly", "declare", "then", "else", "do", "{")
_CLOSING = {'"': '"', "'": "'", "`": "`", "(": ")", "$(": ")", "${": "}"}


def commands_of(text: str) -> list[list[str]]:
    """The words of each command. Raises ValueError for a quote or bracket that nothing closes."""
    reader = _Reader(_HERE_DOCUMENT.sub(r"\3", text), {"HOME": ["~"]})
    reader.read()
    return reader.commands


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


class _Reader:
    """A script while it is read. `variables` have a list of words each: an array's, or one."""

    def __init__(self, text: str, variables: dict[str, list[str]]) -> None:
        self.text, self.variables = text, variables
        self.commands, self.words, self.word = list[list[str]](), list[str](), None

    def read(self) -> None:
        at = 0
        while at < len(self.text):
            char, rest = self.text[at], self.text[at:at + 2]
            if char == "#" and self.word is None:
                at = (self.text + "\n").index("\n", at)
            elif rest == "\\\n" or char in " \t":
                self._end_word()
                at += 1 + (char == "\\")
            elif char == "(" and self.word is not None and re.fullmatch(r"\w+\+?=", self.word):
                at = self._take_array(at)
            elif char in "\n;&|<>()":
                if char in "<>" and self.word is not None and self.word.isdigit():
                    self.word = None  # of 2>file
                self._end_command()
                at += len(re.compile(r"[<>]&\d|.", re.DOTALL).match(self.text, at)[0])
            elif char in "\"'`" or rest in ("$(", "${"):
                end = _end(self.text, at)
                self._take(self.text[at:end])
                at = end
            elif match := re.compile(r"\$(\w+|@)").match(self.text, at):
                self._take(match[0])
                at = match.end()
            else:
                self.word = (self.word or "") + self.text[at + (char == "\\"):at + 1 + (char == "\\")]
                at += 1 + (char == "\\")
        self._end_command()

    def _take(self, part: str) -> None:
        """A quoted text, or an expansion, whose words are apart where no quotes hold them together."""
        if part[0] in "\"'`" and not re.fullmatch(r'"\$\{\w+\[@\]\}"', part):
            text = part[1:-1] if part[0] == "'" else self._in_quotes(part[1:-1]) if part[0] == '"' else part
            self.word = (self.word or "") + text
            return
        part = part.strip('"')
        for index, value in enumerate(self._value(part)):
            if index:
                self._end_word()
            self.word = (self.word or "") + value

    def _take_array(self, at: int) -> int:
        end = _end(self.text, at)
        inner = _Reader(self.text[at + 1:end - 1], self.variables)
        inner.read()
        name = self.word.rstrip("+=")
        before = self.variables.get(name, []) if "+" in self.word or not inner.commands else []  # emptied where a switch is off
        self.variables[name] = [*before, *(word for words in inner.commands for word in words)]
        self.word = None
        return end

    def _end_word(self) -> None:
        if self.word is not None:
            self.words.append(self.word)
        self.word = None

    def _end_command(self) -> None:
        self._end_word()
        words = self.words[bool(self.words) and self.words[0] in _BEFORE_ASSIGNMENTS:]
        if words and all(re.match(r"[A-Za-z_]\w*=", word) for word in words):
            self.variables |= {word.partition("=")[0]: [word.partition("=")[2]] for word in words}
        elif self.words:
            self.commands.append(self.words)
        self.words = []

    def _in_quotes(self, text: str) -> str:
        done, at = "", 0
        while at < len(text):
            if text[at] == "\\" and text[at + 1:at + 2] in ('"', "\\", "$", "\n"):
                done, at = done + text[at + 1].strip("\n"), at + 2
            elif text[at:at + 2] in ("$(", "${"):
                end = _end(text, at)
                done, at = done + " ".join(self._value(text[at:end], is_quoted=True)), end
            elif match := re.compile(r"\$\w+").match(text, at):
                done, at = done + " ".join(self._value(match[0], is_quoted=True)), match.end()
            else:
                done, at = done + text[at], at + 1
        return done

    def _value(self, part: str, *, is_quoted: bool = False) -> list[str]:
        """What an expansion stands for; what is not known stays as it is written."""
        if part.startswith("$((") and part.endswith("))"):
            return [self._arithmetic(part)]
        bare = part[2:-1] if part.startswith("${") else part[1:]
        match = re.fullmatch(r"(\w+)(\[[@*]\])?(?::?[-=](.*))?", bare, flags=re.DOTALL)
        if match is None:
            return [part]
        name, is_array, default = match[1], match[2], match[3]
        if name in self.variables:
            values = self.variables[name]
            is_whole = is_array or is_quoted or any("$(" in value for value in values)
            return values if is_whole else [word for value in values for word in value.split()]
        if default is None:
            return [] if is_array else [part]
        inner = _Reader(default, self.variables)
        inner.read()
        return [word for words in inner.commands for word in words] or [default]

    def _arithmetic(self, part: str) -> str:
        text = re.sub(r"\$?\{?([A-Za-z_]\w*)\}?", lambda name: " ".join(self.variables.get(name[1], [name[0]])), part[3:-2])
        try:
            return str(calculate(ast.parse(text.strip().replace("/", "//"), mode="eval").body, {}))  # the shell's are whole
        except (SyntaxError, ValueError):
            return part


def _end(text: str, start: int) -> int:
    """The index behind what the quote, bracket or expansion at `start` opens."""
    opening = text[start:start + 2] if text[start] == "$" else text[start]
    closing, at = _CLOSING[opening], start + len(opening)
    while at < len(text) and text[at] != closing:
        if text[at] == "\\" and opening != "'":
            at += 2
        elif opening != "'" and text[at:at + 2] in ("$(", "${"):
            at = _end(text, at)
        elif opening not in "\"'`" and text[at] in "\"'(":
            at = _end(text, at)
        elif opening == "(" and text[at] == "#" and text[at - 1].isspace():  # a comment, maybe with a quote or bracket
            at = (text + "\n").index("\n", at)
        else:
            at += 1
    if at >= len(text):
        raise ValueError(f"line {text.count(chr(10), 0, start) + 1} opens {opening} which nothing closes")
    return at + 1


def calculate(node: ast.expr, names: dict[str, object]) -> object:
    """The value of a literal, of a name with a known one, or of their arithmetic. Raises ValueError for anything else."""
    if ast.unparse(node) in names:
        return names[ast.unparse(node)]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = calculate(node.left, names), calculate(node.right, names)
        is_division = isinstance(node.op, (ast.Div, ast.FloorDiv))
        if isinstance(left, (int, float)) and isinstance(right, (int, float)) and not (is_division and right == 0):
            return _OPERATORS[type(node.op)](left, right)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError) as error:
        raise ValueError(f"{ast.unparse(node)} is not known before the program runs") from error
