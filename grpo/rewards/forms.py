"""The signatures of reward functions, and the arguments that each is called with.

A function's parameters tell its form (sync or async):
  batch       `f(completions, prompts, completion_ids, trainer_state, log_extra, log_metric, <column>, **kwargs) -> list`
              once per batch, columns as lists (TRL); `answers, infos, states, tasks` are lists too (verifiers, group);
              a function that takes nothing but **kwargs is of this form
  verl batch  `f(data_sources, solution_strs, ground_truths, extra_infos, **kwargs) -> list` once per batch
  verl        `f(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> float | dict` once per completion
  single      `f(completion, prompt, answer, info, state, task) -> float` once per completion (verifiers)
  native      `f(row, text) -> float | dict` once per completion; also `thinking`, `is_truncated`, any column

`text`, `solution_str` and a completion's content are the final channel only, so an answer in the reasoning earns nothing. A
completion is text or messages, as its prompt is, unless the parameter's annotation asks for one of them.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

FORMS = {
    "batch": ("completions", "prompts", "completion_ids", "answers", "infos", "states", "tasks"),
    "verl batch": ("solution_strs", "ground_truths", "data_sources", "extra_infos"),
    "verl": ("solution_str", "ground_truth", "data_source", "extra_info"),
    "single": ("completion", "prompt", "info", "state", "task"),
    "native": ("row", "text", "thinking", "is_truncated", "answer"),
}
# parameters that tell the form; verl's others may be columns or settings of a function of another form
TELLING = FORMS | {"verl": ("solution_str", "ground_truth")}
CALLBACKS = ("trainer_state", "log_extra", "log_metric")
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass
class Sample:
    """Everything that a reward function can get about one completion."""

    row: dict  # columns of the data row
    source: str  # "file:line" of the row
    prompt: str | list[dict]  # as the row has it: text, or messages
    text: str  # content of the final message; "" where the completion is cut off or has another fault (Parsed.final)
    thinking: str  # content of the analysis channel
    completion_ids: list[int]
    is_truncated: bool
    answer: object  # of the mapped column: text, or a list or dict as the data has it; None without one


@dataclass
class TrainerState:
    """The trainer's state, with TRL's names."""

    global_step: int  # finished steps
    max_steps: int
    epoch: float  # passes over the data
    num_train_epochs: int
    train_batch_size: int  # completions of a step
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    log_history: list[dict] = field(default_factory=list)
    best_metric: float | None = None
    best_model_checkpoint: str | None = None
    trial_name: str | None = None


class Signature:
    """A function's parameters, and the form that they tell. given: the parameters that the config's kwargs fill.

    Raises TypeError or ValueError if Python cannot tell the parameters."""

    def __init__(self, function: Callable, given: set[str]):
        self.parameters = inspect.signature(function).parameters
        kinds = self.parameters.values()
        self.named = {parameter.name for parameter in kinds if parameter.kind in BY_NAME}
        self.takes_rest = any(parameter.kind is parameter.VAR_KEYWORD for parameter in kinds)
        # positional-only parameters are never filled: functions are called with keywords
        self.unfilled = {parameter.name for parameter in kinds if parameter.default is parameter.empty
                         and parameter.kind in (*BY_NAME, parameter.POSITIONAL_ONLY)} - given
        asked = self.named - given
        forms = [form for form, names in TELLING.items() if asked.intersection(names)]
        if not forms and self.takes_rest and not self.named and not self.unfilled:
            forms = ["batch"]
        self.form = forms[0] if forms else None  # None: the function scores nothing; it may make one that does

    def standard_names(self, columns: set[str], *, has_answer: bool) -> set[str]:
        """The parameter names that every completion can fill, besides the data's columns."""
        more = {"batch": CALLBACKS, "single": FORMS["native"]}
        names = {*FORMS[self.form], *more.get(self.form, ())}
        if not has_answer:
            names -= {"answer", "answers"}
            if not columns & {"reward_model", "ground_truth"}:
                names -= {"ground_truth", "ground_truths"}
        return names

    def values_of(self, sample: Sample) -> dict:
        """The arguments for one completion."""
        row = copy.deepcopy(sample.row)
        native = {"row": row, "text": sample.text, "thinking": sample.thinking, "is_truncated": sample.is_truncated}
        standard = _verl_values(sample, row) if self.form == "verl" else self._single_values(sample, row)
        named = {name: value for name, value in (row | standard | native).items() if name in self.named}
        # **kwargs gets the form's standard names, not every column
        return standard | named if self.takes_rest and self.form != "native" else named

    def values_of_all(self, samples: list[Sample], callbacks: dict) -> dict:
        """The arguments for a batch of completions; `callbacks` has the values of CALLBACKS."""
        if self.form == "verl batch":
            rows = [_verl_values(sample, copy.deepcopy(sample.row)) for sample in samples]
            values = {f"{name}s": [row[name] for row in rows] for name in FORMS["verl"]}
        else:
            values = self._batch_values(samples) | callbacks
        return values if self.takes_rest else {name: value for name, value in values.items() if name in self.named}

    def _batch_values(self, samples: list[Sample]) -> dict:
        # TRL keeps a column named like the prompt or completion to itself, and functions may pass **kwargs on
        names = dict.fromkeys(name for sample in samples for name in sample.row
                              if name in self.named or name not in ("prompt", "completion"))
        values = {"answer": [copy.deepcopy(sample.answer) for sample in samples]} if "answer" in self.named else {}
        values |= {name: [copy.deepcopy(sample.row.get(name)) for sample in samples] for name in names}
        values |= {"prompts": [self._prompt(sample, "prompts") for sample in samples],
                   "completions": [self._completion(sample, "completions") for sample in samples],
                   "completion_ids": [list(sample.completion_ids) for sample in samples]}
        plurals = {f"{name}s" for name in ("answer", "info", "state", "task")} & self.named
        singles = [self._single_values(sample, copy.deepcopy(sample.row)) for sample in samples] if plurals else []
        return {name: [single.get(name[:-1]) for single in singles] for name in plurals} | values

    def _single_values(self, sample: Sample, row: dict) -> dict:
        values = {"prompt": self._prompt(sample, "prompt"), "completion": self._completion(sample, "completion"),
                  "info": row.get("info", row.get("extra_info")) or {}, "task": row.get("task", "")}
        if sample.answer is not None:  # where no answer column is mapped, a column of that name may still stand in
            values["answer"] = copy.deepcopy(sample.answer)
        return values | {"state": dict(values)}

    def _completion(self, sample: Sample, name: str) -> str | list[dict]:
        asked = self._asked_form(name)
        if asked == "text" or (asked is None and isinstance(sample.prompt, str)):
            return sample.text
        return [{"role": "assistant", "content": sample.text, "thinking": sample.thinking}]

    def _prompt(self, sample: Sample, name: str) -> str | list[dict]:
        if self._asked_form(name) == "messages" and isinstance(sample.prompt, str):
            return [{"role": "user", "content": sample.prompt}]
        return copy.deepcopy(sample.prompt)

    def _asked_form(self, name: str) -> str | None:
        """"messages" or "text" where a parameter's annotation says so, as TRL's own functions do (`list[list[dict]]`)."""
        if name not in self.parameters:
            return None
        annotation = inspect.formatannotation(self.parameters[name].annotation).lower().strip("'\"")
        if "dict" in annotation or "message" in annotation:
            return "messages"
        return "text" if annotation.removeprefix("typing.") in ("str", "list[str]", "sequence[str]") else None


def _verl_values(sample: Sample, row: dict) -> dict:
    """verl's four values. The ground truth, a text, list or dict, is the mapped answer column; without one, what the column
    `reward_model` has."""
    truth = copy.deepcopy(sample.answer)
    if truth is None:
        model = row.get("reward_model")
        truth = model.get("ground_truth") if isinstance(model, dict) else row.get("ground_truth")
    return {"data_source": row.get("data_source", ""), "solution_str": sample.text, "ground_truth": truth,
            "extra_info": row.get("extra_info") or {}}
