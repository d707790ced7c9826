"""An explained step (grpo/explain.py) as text for a terminal and as one HTML page that needs nothing beside it."""
from dataclasses import dataclass
from html import escape

import torch

from grpo.record.terminal import format_number, one_line
from grpo.report import STYLE
from grpo.token_record import TokenRecord

MOST_EXPERTS = 12  # numbers in a line of text; the page has all
COLUMNS = {  # name in a TokenRecord -> its head
    "log_prob": "log-prob", "entropy": "entropy", "advantage": "advantage", "ratio": "ratio", "kl": "KL", "c": "dL/dlogp",
    "dL/dH": "dL/dH", "dL/dKL": "dL/dKL", "share": "share"}
LEGEND = (
    "log-prob and entropy in nats, by the trainer; ratio: pi / pi_old; dL/dlogp: the loss's derivative by the token's log-prob, "
    "below 0 where the update makes the token more likely; share: |dL/dlogp| (1 - p) over the sum of the step's, p the token's "
    "probability: how much of the gradient (by logits) the token is; experts: of the row that predicted it, layer by layer")
PAGE_STYLE = """
.tokens { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; padding: 10px; line-height: 1.9;
  font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens span { border-radius: 3px; } .tokens span:hover { outline: 1px solid #1c2330; }
.prompt { color: #667080; } td.t { text-align: left; font-family: ui-monospace, monospace; white-space: pre; }
"""


@dataclass
class ExplainedCompletion:
    prompt: str
    prompt_id: int
    sample: int
    reward: float | None
    advantage: float | None
    finish_reason: str
    num_tokens: int  # that the policy sampled
    texts: list[str]  # of the trained tokens
    tokens: TokenRecord | None  # None: not trained on
    left_out: str | None  # why not


@dataclass
class Explanation:
    title: str
    checks: list[str]  # what was compared and how it went
    is_reproduced: bool
    metrics: dict[str, float]
    completions: list[ExplainedCompletion]

    @property
    def by_share(self) -> list[int]:
        """Completions, those with most of the gradient first."""
        return sorted(range(len(self.completions)), key=lambda index: -_share(self.completions[index]))


def _share(completion: ExplainedCompletion) -> float:
    return float(completion.tokens.columns["share"].sum()) if completion.tokens is not None else 0.0


def as_text(explanation: Explanation, samples: list[int]) -> str:
    """The step as lines: what was compared, a line for each completion, and a line for each token of completions `samples`."""
    lines = [explanation.title, *explanation.checks, "",
             f"{'sample':>6}  {'prompt':>8}  {'reward':>8}  {'advantage':>9}  {'tokens':>6}  {'share':>6}  finish"]
    for index, completion in enumerate(explanation.completions):
        lines.append(f"{index:>6}  {completion.prompt_id:>8}  {_number(completion.reward):>8}  "
                     f"{_number(completion.advantage):>9}  {completion.num_tokens:>6}  {_share(completion):>6.1%}  "
                     + completion.finish_reason + ("" if completion.tokens is not None else "; not trained on"))
    for index in samples:
        completion = explanation.completions[index]
        lines += ["", f"sample {index}, prompt: {one_line(completion.prompt, 300)}"]
        if completion.tokens is None:
            lines.append(f"not trained on: {completion.left_out}")
            continue
        columns = _columns(completion.tokens)
        lines.append("  ".join([f"{'':>5}", f"{'token':<14}", *(f"{COLUMNS[name]:>9}" for name in columns), "experts"]))
        for place, text in enumerate(completion.texts):
            values = [f"{values[place]:>9.2%}" if name == "share" else f"{_number(float(values[place])):>9}"
                      for name, values in columns.items()]
            lines.append("  ".join([f"{place:>5}", f"{_visible(text):<14.14}", *values,
                                    _experts(completion.tokens.experts[place], MOST_EXPERTS)]))
    return "\n".join([*lines, "", LEGEND])


def as_page(explanation: Explanation, samples: list[int]) -> str:
    """The same as a page, with the text of completions `samples` coloured by share: green where the update makes a token more
    likely, red where less. Texts of the run are escaped."""
    rows = "".join(
        f"<tr><td>{f'<a href=#s{index}>{index}</a>' if index in samples else index}</td><td>{completion.prompt_id}</td>"
        f"<td>{_number(completion.reward)}</td><td>{_number(completion.advantage)}</td><td>{completion.num_tokens}</td>"
        f"<td>{_share(completion):.1%}</td><td>{escape(completion.finish_reason)}"
        f"{'' if completion.tokens is not None else ', not trained on'}</td></tr>"
        for index, completion in enumerate(explanation.completions))
    head = "".join(f"<th>{name}</th>" for name in ("sample", "prompt", "reward", "advantage", "tokens", "share", "finish"))
    checks = "".join(f"<li>{escape(line)}</li>" for line in explanation.checks)
    metrics = "".join(f"<tr><td>{escape(name)}</td><td>{_number(value)}</td></tr>" for name, value in explanation.metrics.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(explanation.title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{STYLE}{PAGE_STYLE}</style></head><body><main>
<h1>{escape(explanation.title)}</h1>
<ul class="{'good' if explanation.is_reproduced else 'bad'}">{checks}</ul>
<h2>Completions</h2><div class="wide"><table><tr>{head}</tr>{rows}</table></div>
{"".join(_section(index, explanation.completions[index]) for index in samples)}
<h2>Metrics of the step</h2><details><summary>{len(explanation.metrics)} of them</summary><table>{metrics}</table></details>
<p class="muted">{escape(LEGEND)}. A page has the completions with the largest shares; sample=N names another.</p>
</main></body></html>
"""


def _section(index: int, completion: ExplainedCompletion) -> str:
    title = f'<h2 id="s{index}">Sample {index}</h2><div class="tokens"><span class="prompt">{escape(completion.prompt)}</span>'
    if completion.tokens is None:
        return f"{title}</div><p>not trained on: {escape(completion.left_out)}</p>"
    columns, largest = _columns(completion.tokens), float(completion.tokens.columns["share"].max())
    spans, rows = [], []
    for place, text in enumerate(completion.texts):
        values = {COLUMNS[name]: f"{values[place]:.2%}" if name == "share" else _number(float(values[place]))
                  for name, values in columns.items()}
        strength = float(completion.tokens.columns["share"][place]) / largest if largest > 0 else 0.0
        colour = "32,116,74" if float(completion.tokens.columns["c"][place]) < 0 else "176,52,39"
        tip = "\n".join([*(f"{name} {value}" for name, value in values.items()),
                         f"experts {_experts(completion.tokens.experts[place], None)}"])
        spans.append(f'<span style="background:rgba({colour},{0.75 * strength**0.5:.2f})" title="{escape(tip)}">'
                     f"{escape(text)}</span>")
        rows.append(f'<tr><td>{place}</td><td class="t">{escape(_visible(text))}</td>'
                    + "".join(f"<td>{value}</td>" for value in values.values())
                    + f'<td class="t">{_experts(completion.tokens.experts[place], None)}</td></tr>')
    head = "".join(f"<th>{name}</th>" for name in ("", "token", *(COLUMNS[name] for name in columns), "experts"))
    return (f"{title}{''.join(spans)}</div><details><summary>{len(rows)} tokens</summary><div class=\"wide\"><table>"
            f"<tr>{head}</tr>{''.join(rows)}</table></div></details>")


def _columns(tokens: TokenRecord) -> dict[str, torch.Tensor]:
    """Those that are shown, in order; derivatives that are 0 everywhere are not."""
    return {name: tokens.columns[name] for name in COLUMNS
            if name in tokens.columns and (not name.startswith("dL/d") or bool(tokens.columns[name].any()))}


def _experts(layers: torch.Tensor, limit: int | None) -> str:
    """The experts of each layer, as "3,17 | 0,5"; of the first layers if there are more than `limit` numbers."""
    shown = len(layers) if limit is None else max(1, limit // layers.shape[1])
    text = " | ".join(",".join(map(str, row)) for row in layers[:shown].tolist())
    return text + (" | ..." if shown < len(layers) else "")


def _visible(text: str) -> str:
    return repr(text)[1:-1].replace(" ", "\u2423")


def _number(value: float | None) -> str:
    return "-" if value is None else format_number(value)
