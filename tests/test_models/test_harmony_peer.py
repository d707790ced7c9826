"""Harmony against the hub's chat template itself, run by transformers in another environment.

GRPO_PEER_PYTHON names a Python with transformers and trl; trl (`pip install --no-deps trl`) carries an exact copy of
the template.
"""

import json
import os
import random
import re
import subprocess
from pathlib import Path

import pytest

from models.chat.render import render_chat
from models.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"

PEER_SCRIPT = """
import importlib.util, json, sys
spec = importlib.util.find_spec("trl")
if spec is None or importlib.util.find_spec("transformers") is None:
    sys.exit(42)
import pathlib
from transformers.utils.chat_template_utils import render_jinja_template
folder = pathlib.Path(spec.submodule_search_locations[0])
template = (folder / "chat_templates" / "gptoss.jinja").read_text(encoding="utf-8")
texts = []
for case in json.load(sys.stdin):
    try:
        rendered = render_jinja_template(
            [case["messages"]], case["tools"], chat_template=template, **case["options"]
        )[0][0]
    except Exception as error:
        rendered = {"error": f"{type(error).__name__}: {error}"}
    texts.append(rendered)
json.dump(texts, sys.stdout)
"""


def random_schema(rng: random.Random, depth: int) -> object:
    schema: dict = {}
    kind = rng.choice(
        [
            "string",
            "number",
            "integer",
            "boolean",
            "array",
            "object",
            "null",
            ["string", "null"],
            "oneOf",
            "anyOf",
            None,
        ]
    )
    if kind in ("oneOf", "anyOf"):
        schema[kind] = [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))] if depth > 0 else []
    elif kind is not None:
        schema["type"] = kind
    if kind == "string" and rng.random() < 0.4:
        schema["enum"] = rng.sample(["a", "b b", 'c"', "é"], rng.randint(0, 3))
    if kind == "array" and rng.random() < 0.8:
        schema["items"] = random_schema(rng, depth - 1) if depth > 0 else {}
    if kind == "object" and depth > 0 and rng.random() < 0.8:
        schema["properties"] = {
            name: random_schema(rng, depth - 1) for name in rng.sample(["x", "items", "type"], rng.randint(0, 3))
        }
        schema["required"] = rng.sample(["x", "items"], rng.randint(0, 2))
    if rng.random() < 0.3:
        schema["nullable"] = rng.random() < 0.7
    if rng.random() < 0.3:
        schema["description"] = rng.choice(["", "what it is", "two\nlines <b>&'"])
    if rng.random() < 0.3:
        is_text = schema.get("enum") or schema.get("oneOf")
        schema["default"] = "a" if is_text else rng.choice(["q", 3, -0.5, None, True, [1, "é"], {"k": []}])
    return schema


def random_case(rng: random.Random) -> dict:
    tools = []
    for name in rng.sample(["f", "get_x", "h"], rng.choice([0, 0, 1, 2, 3])):
        function: dict = {"name": name, "description": rng.choice(["d", "do it\nwell", ""])}
        if rng.random() < 0.8:
            names = rng.sample(["a", "b", "items", "values"], rng.randint(0, 4))
            function["parameters"] = {"type": "object", "properties": {n: random_schema(rng, 2) for n in names}}
            if rng.random() < 0.7:
                function["parameters"]["required"] = rng.sample(["a", "items"], rng.randint(0, 2))
        tools.append({"type": "function", "function": function})
    texts = ["", "a", "x\n\ny  ", "“é” & <b>", "👋"]
    messages: list[dict] = []
    if rng.random() < 0.5:
        messages.append({"role": rng.choice(["system", "developer"]), "content": rng.choice(texts)})
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": rng.choice(texts)})
        for _ in range(rng.choice([0, 0, 1, 2])):
            call = {
                "name": rng.choice(["f", "get_x"]),
                "arguments": rng.choice([{}, {"k": ["é", 1.5, None]}, '{"a": 1}', None]),
            }
            message: dict = {
                "role": "assistant",
                "tool_calls": [rng.choice([call, {"type": "function", "function": call}])],
            }
            message.update(rng.choice([{}, {"thinking": "t"}, {"content": "c"}, {"content": "", "thinking": "u"}]))
            messages.append(message)
            if rng.random() < 0.9:
                messages.append({"role": "tool", "content": rng.choice(["sunny", {"t": 20}, [], 3, 'q"'])})
        if rng.random() < 0.8:
            messages.append({"role": "assistant", "content": rng.choice(texts)})
            messages[-1].update(rng.choice([{}, {"thinking": "r"}, {"reasoning": "s"}, {"thinking": ""}]))
    options: dict = {"add_generation_prompt": rng.random() < 0.5}
    if rng.random() < 0.5:
        options["reasoning_effort"] = rng.choice(["low", "high"])
    if rng.random() < 0.3:
        options["model_identity"] = "You are a test."
    if rng.random() < 0.3:
        options["builtin_tools"] = rng.sample(["browser", "python"], rng.randint(0, 2))
    return {"messages": messages, "tools": tools, "options": options}


@pytest.mark.parametrize("name", ["tokenizer_real_ids", "tokenizer_compact"])
def test_random_conversations_render_as_the_hub_template_in_transformers(name):
    tokenizer = Tokenizer.load(FIXTURES / name)
    peer = os.environ.get("GRPO_PEER_PYTHON")
    if not peer:
        pytest.skip("GRPO_PEER_PYTHON does not name a Python that has transformers and trl")
    rng = random.Random(0)
    cases = [random_case(rng) for _ in range(400)]
    result = subprocess.run(
        [peer, "-c", PEER_SCRIPT], input=json.dumps(cases), capture_output=True, text=True, timeout=300
    )
    if result.returncode == 42:
        pytest.skip("GRPO_PEER_PYTHON has no transformers and trl (trl carries a copy of the hub's template)")
    assert result.returncode == 0, result.stderr
    for case, expected in zip(cases, json.loads(result.stdout), strict=True):
        assert isinstance(expected, str), (case, expected)
        date = re.search(r"Current date: (\S+)", expected).group(1)
        ids = render_chat(case["messages"], tokenizer, current_date=date, tools=case["tools"], **case["options"])
        assert tokenizer.decode(ids, keep_special=True) == expected
        assert ids == tokenizer.encode_with_special(expected)
