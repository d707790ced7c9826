"""What an environment hands back is checked and converted where it enters; faults name the method and the item."""

import decimal
import fractions
import inspect
import json
from array import array
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grpo.batch import Completion, Prompt, Segment
from grpo.config import ConfigError, InFlight
from grpo.environment import (
    Environment,
    EnvironmentFault,
    OptionalMethods,
    Score,
    check_environment,
    check_methods,
    checked_demonstrations,
    checked_prompts,
    checked_scores,
    encode_question,
    held_out_prompts,
    make_environment,
    summary_of,
    tiny_tokenizer,
)
from grpo.envs.carry import Carry
from grpo.envs.dataset import Dataset
from grpo.evaluate import evaluate
from grpo.groups import completion_record
from grpo.rewards.user_code import UserCodeFault
from grpo.rollout.sampling import SamplingParams

VOCAB = 5


def completions(num=2):
    prompt = Prompt(0, [1], {"question": "q"})
    return [Completion(prompt, i, [Segment([1], "prompt"), Segment([2], "policy", [-1.0])], "stop") for i in range(num)]


def scored(**fields):
    verdict = Score(**{"reward": 1.0, "parts": {}, "metrics": {}, "is_correct": None, **fields})
    [found] = checked_scores(SimpleNamespace(score=lambda _: [verdict]), completions(1))
    return found


# --- scores -----------------------------------------------------------------------------------------------------------

NUMBERS = [
    (np.float32(0.25), 0.25), (np.int64(3), 3.0), (np.bool_(True), 1.0), (True, 1.0), (fractions.Fraction(1, 4), 0.25),
    (decimal.Decimal("0.25"), 0.25), (torch.tensor(0.25), 0.25), (torch.tensor([2]), 2.0), (np.array(0.25), 0.25),
    (np.array([0.25]), 0.25), (torch.tensor(0.25, dtype=torch.bfloat16, requires_grad=True), 0.25), (1e9, 1e9),
]


@pytest.mark.parametrize("given, plain", NUMBERS)
def test_numbers_of_any_kind_become_floats(given, plain):
    found = scored(reward=given, parts={"p": given}, metrics={"m": given})
    for value in (found.reward, found.parts["p"], found.metrics["m"]):
        assert type(value) is float and value == plain


@pytest.mark.parametrize("given, words", [
    (1e155, r"magnitudes up to 1e\+09 are allowed"), (-1e200, r"magnitudes up to 1e\+09"), (10**400, "no number"),
    (float("inf"), "not finite"), ("1.0", "a str"), ([1.0], "a list"), (1j, "a complex"), (np.complex64(1), "a complex64"),
    (torch.zeros(2), "no number"), (object(), "a object"),
])
def test_what_is_no_number_that_can_be_trained_on_names_environment_and_sample(given, words):
    where = rf"environment SimpleNamespace.score gave .*to sample 0 of prompt 0 \(.*question.*{words}"
    for fields in ({"reward": given}, {"parts": {"p": given}}, {"metrics": {"m": given}}):
        with pytest.raises(EnvironmentFault, match=where):
            scored(**fields)


def test_what_was_not_measured_is_left_out_of_parts_and_metrics():
    found = scored(parts={"a": None, "b": 1}, metrics={"c": float("nan"), "d": np.float64("nan"), "e": 2})
    assert (found.parts, found.metrics) == ({"b": 1.0}, {"e": 2.0})


@pytest.mark.parametrize("field", ["parts", "metrics", "extra"])
def test_parts_metrics_and_extra_are_dicts(field):
    with pytest.raises(EnvironmentFault, match="expected a dict"):
        scored(**{field: [1.0]})


@pytest.mark.parametrize("given, plain", [(None, None), (np.bool_(True), True), (1, True), (0.0, False)])
def test_correctness_becomes_a_bool(given, plain):
    assert scored(is_correct=given).is_correct is plain


def test_correctness_is_no_text():
    with pytest.raises(EnvironmentFault, match="is_correct='yes'"):
        scored(is_correct="yes")


def test_entries_for_the_log_become_json():
    loop = []
    loop.append(loop)
    found = scored(extra={"loop": loop, 3: {1}, "nan": float("nan"), "array": np.arange(2), "kept": {"a": [1, None]}})
    assert json.loads(json.dumps(found.extra, allow_nan=False)) == {
        "loop": "[[...]]", "3": "{1}", "nan": "nan", "array": "array([0, 1])", "kept": {"a": [1, None]}}


class Tokens:
    def decode(self, ids, *, keep_special):
        return " ".join(map(str, ids))


def record(described, extra):
    env = SimpleNamespace(describe=lambda completion: described)
    [completion] = completions(1)
    return completion_record(Tokens(), env, completion, Score(1.0, {}, {}, None, extra), split="train")


def test_names_of_the_log_are_the_trainers_where_both_want_them():
    found = record({"question": "q", "reward": 7, "step": 9}, {"reward": "high", "question": "theirs", "note": "n"})
    assert (found["reward"], found["env/reward"], found["extra/reward"]) == (1.0, 7, "high")
    assert "step" not in found and found["env/step"] == 9  # the log puts its own in front
    assert (found["question"], found["extra/question"], found["note"]) == ("q", "theirs", "n")


@pytest.mark.parametrize("described", [None, "text", ["a"], 3])
def test_a_description_that_is_no_dict_names_the_environment(described):
    with pytest.raises(EnvironmentFault, match="SimpleNamespace.describe returned .*expected a dict"):
        record(described, {})


def test_a_description_that_raises_names_the_environment():
    def describe(completion):
        raise KeyError("question")

    [completion] = completions(1)
    with pytest.raises(EnvironmentFault, match="SimpleNamespace.describe raised KeyError"):
        completion_record(Tokens(), SimpleNamespace(describe=describe), completion, Score(1.0, {}, {}, None), split="train")


def test_an_evaluations_own_names_win_over_an_environments_metrics():
    names = ("reward", "mean_length", "clipped_ratio", "greedy_accuracy", "avg@1", "time/eval", "greedy/reward")
    metrics = dict.fromkeys((*names, "carries"), 77.0)
    env = SimpleNamespace(score=lambda completions: [Score(1.0, {}, dict(metrics), True) for _ in completions])
    sampler = SimpleNamespace(generate=lambda prompts, params, **settings: completions(1))
    found, _ = evaluate(env, sampler, [completions(1)[0].prompt], SamplingParams(max_new_tokens=5), num_samples=1,
                        greedy=True)
    assert found["reward"] == found["greedy/reward"] == found["avg@1"] == found["greedy_accuracy"] == 1.0
    assert (found["env/reward"], found["env/avg@1"], found["env/time/eval"], found["carries"]) == (77.0,) * 4


# --- prompts ----------------------------------------------------------------------------------------------------------


def check(*prompts, taken=None):
    return checked_prompts(SimpleNamespace(), "prompts", list(prompts), vocab_size=VOCAB, taken=taken)


@pytest.mark.parametrize("token_ids", [
    [0, 4], (0, 4), array("i", [0, 4]), np.array([0, 4]), torch.tensor([0, 4]), [np.int64(0), np.int32(4)]])
def test_prompts_of_integers_of_any_kind_become_plain(token_ids):
    [prompt] = check(Prompt(np.int64(3), token_ids, {}))
    assert (type(prompt.id), prompt.id, prompt.token_ids) == (int, 3, [0, 4])
    assert [type(token) for token in prompt.token_ids] == [int, int]


@pytest.mark.parametrize("token_ids, words", [
    ([0, 5], "token id '5' is none of the model's vocabulary, the integers from 0 to 4"), ([-1], "token id '-1'"),
    (["a"], "token id 'a'"), ([1.0], "token id '1.0'"), ([True], "token id 'True'"), ([], "expected a list of at least one"),
    ("text", "expected a list"), (None, "expected a list"), (torch.tensor([[1]]), r"token id '\[1\]'"), (5, "expected a list"),
])
def test_token_ids_that_are_none_name_method_and_prompt(token_ids, words):
    with pytest.raises(EnvironmentFault, match=rf"environment SimpleNamespace.prompts: prompt 1 \(id '7'\): .*{words}"):
        check(Prompt(0, [1], {}), Prompt(7, token_ids, {}))


@pytest.mark.parametrize("prompt_id", ["row-7", 1.0, None, True, -1, 2**63])
def test_a_prompts_id_is_an_integer(prompt_id):
    with pytest.raises(EnvironmentFault, match=r"prompts: prompt 0 \(id .*must be an integer from 0 to 2\^63 - 1"):
        check(Prompt(prompt_id, [1], {}))


def test_equal_ids_are_refused_in_a_call_and_in_a_step():
    with pytest.raises(EnvironmentFault, match=r"prompt 1 \(id '3'\): another prompt of this step has the same id"):
        check(Prompt(np.int64(3), [1], {}), Prompt(3, [2], {}))
    with pytest.raises(EnvironmentFault, match=r"prompt 0 \(id '3'\): another prompt"):
        check(Prompt(3, [1], {}), taken={3})


def test_evaluation_prompts_are_checked_alike():
    env = SimpleNamespace(eval_prompts=lambda: [Prompt(0, [VOCAB], {})])
    with pytest.raises(EnvironmentFault, match="SimpleNamespace.eval_prompts: prompt 0 .*token id '5'"):
        held_out_prompts(env, max_prompts=1, max_len=9, vocab_size=VOCAB)


@pytest.mark.parametrize("pairs, words", [
    ([], r"returned '\[\]'"), (None, "returned 'None'"), ([([1], [2], [3])], "return a list of at least one"),
    ([([1], [])], "completion of pair 0: token ids are"), ([([1], [2]), ([9], [2])], "prompt of pair 1: token id '9'"),
])
def test_demonstrations_that_cannot_be_trained_on_name_the_pair(pairs, words):
    env = SimpleNamespace(demonstrations=lambda step, size: pairs)
    with pytest.raises(EnvironmentFault, match=f"SimpleNamespace.demonstrations.*{words}"):
        checked_demonstrations(env, 0, 2, vocab_size=VOCAB)


def test_demonstrations_of_arrays_become_lists():
    env = SimpleNamespace(demonstrations=lambda step, size: [(np.array([1]), torch.tensor([2, 3]))])
    assert checked_demonstrations(env, 0, 1, vocab_size=VOCAB) == [([1], [2, 3])]


def test_a_question_asked_by_hand_is_checked_alike():
    assert encode_question(SimpleNamespace(encode_prompt=lambda question: (1, 2)), "q", vocab_size=VOCAB) == [1, 2]
    with pytest.raises(EnvironmentFault, match="SimpleNamespace.encode_prompt: token id '9'"):
        encode_question(SimpleNamespace(encode_prompt=lambda question: [9]), "q", vocab_size=VOCAB)

    def refuses(question):
        raise ValueError("no digits in it")

    with pytest.raises(ValueError, match="^no digits in it$"):  # the question's fault
        encode_question(SimpleNamespace(encode_prompt=refuses), "q", vocab_size=VOCAB)


class BringsText:
    @staticmethod
    def build_tokenizer():
        return "tokenizer.json"


def test_the_tokenizer_that_an_environment_brings_is_one():
    with pytest.raises(EnvironmentFault, match="BringsText.build_tokenizer returned a str"):
        tiny_tokenizer(BringsText)


def test_a_summary_is_a_text_or_names_the_environment():
    def broken():
        raise KeyError("rows")

    assert [summary_of(env) for env in (object(), SimpleNamespace(summary=lambda: 3))] == ["", "3"]
    with pytest.raises(EnvironmentFault, match="SimpleNamespace.summary raised KeyError"):
        summary_of(SimpleNamespace(summary=broken))


# --- the start of a run -----------------------------------------------------------------------------------------------


def evaluated(**changes):
    schedule = SimpleNamespace(every=0, at_start=False, at_end=False, max_prompts=2)
    return SimpleNamespace(warmup=None, eval=SimpleNamespace(**vars(schedule) | changes),
                           optim=SimpleNamespace(max_tokens=100),
                           rollout=SimpleNamespace(max_new_tokens=5, in_flight=InFlight.keep))


def drawn(step, *, num_prompts, attempt):
    return []


def test_an_environment_that_lacks_a_method_is_named_with_what_to_read():
    config = evaluated()
    with pytest.raises(EnvironmentFault, match="environment SimpleNamespace has no prompts, score; grpo.environment.Environment"):
        check_environment(SimpleNamespace(eval_prompts=list), config, max_len=9, vocab_size=VOCAB)
    check_environment(SimpleNamespace(prompts=drawn, eval_prompts=list, score=list), config, max_len=9, vocab_size=VOCAB)


@pytest.mark.parametrize("prompts, words", [
    (lambda step, count: [], r"prompts is called as prompts\(step, \*, num_prompts, attempt\), which it does not take: .*count"),
    (lambda step, *, num_prompts: [], "unexpected keyword argument 'attempt'; grpo.environment.Environment says what each is"),
    (lambda: [], "too many positional arguments"),
])
def test_an_environment_whose_method_takes_other_arguments_is_told_before_a_step(prompts, words):
    env = SimpleNamespace(prompts=prompts, eval_prompts=lambda: [], score=lambda completions: [])
    with pytest.raises(EnvironmentFault, match=f"^environment SimpleNamespace.*{words}"):
        check_methods(env, ("prompts", "score"))
    check_methods(env, ("eval_prompts", "score"))
    for taken in (lambda step, num_prompts, attempt: [], lambda step, **settings: [], lambda *_, **__: []):
        env.prompts = taken
        check_methods(env, ("prompts",))


@pytest.mark.parametrize("fixed", [{}, {"train_prompts": lambda: [Prompt(0, [1], {})]}])
def test_an_environment_without_evaluation_prompts_trains_where_nothing_is_evaluated(fixed):
    env = SimpleNamespace(prompts=drawn, score=list, **fixed)
    check_environment(env, evaluated(), max_len=9, vocab_size=VOCAB)
    for change in ({"every": 3}, {"at_start": True}, {"at_end": True}):
        with pytest.raises(EnvironmentFault, match="environment SimpleNamespace has no eval_prompts; grpo.environment.Envir"):
            check_environment(env, evaluated(**change), max_len=9, vocab_size=VOCAB)


def test_a_property_in_a_methods_place_that_raises_is_named_with_its_line():
    class Scorer:
        prompts, eval_prompts = staticmethod(drawn), list

        @property
        def score(self):
            return self.weights

    with pytest.raises(EnvironmentFault, match=r"environment Scorer.score raised AttributeError: 'Scorer' object has no "
                                               r"attribute 'weights' \(.*test_environment.py:\d+\)"):
        check_environment(Scorer(), evaluated(at_end=True), max_len=9, vocab_size=VOCAB)


def test_a_warm_up_wants_demonstrations():
    env = SimpleNamespace(prompts=drawn, eval_prompts=list, score=list)
    with pytest.raises(ConfigError, match=r"warmup: SimpleNamespace has no demonstrations\(step, batch_size\)"):
        check_environment(env, SimpleNamespace(warmup=object()), max_len=9, vocab_size=VOCAB)


def parameters(method):
    return {name: item.kind for name, item in inspect.signature(method).parameters.items()}


@pytest.mark.parametrize("env", [Carry, Dataset])
def test_the_environments_here_have_the_methods_of_the_protocols_with_their_parameters(env):
    optional = [name for name in vars(OptionalMethods) if not name.startswith("_") and hasattr(env, name)]
    assert len(optional) >= 4
    assert {name for name in vars(Environment) if not name.startswith("_")} == {"prompts", "eval_prompts", "score"}
    for protocol, names in ((Environment, ("prompts", "eval_prompts", "score")), (OptionalMethods, optional)):
        for name in names:
            assert parameters(getattr(env, name)) == parameters(getattr(protocol, name)), name


# --- building ---------------------------------------------------------------------------------------------------------

MODULE = """
import sys

class Told:
    def __init__(self, *, tokenizer, seed, total_steps):
        self.told = total_steps

class Plain:
    def __init__(self, *, tokenizer, seed):
        self.told = None

class Leaves:
    def __init__(self, *, tokenizer, seed):
        sys.exit(3)
"""


def test_an_environment_is_told_the_number_of_steps_if_it_asks(tmp_path, monkeypatch):
    (tmp_path / "told_envs.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    built = [make_environment({"_target_": f"told_envs.{name}"}, None, seed=0, total_steps=40) for name in ("Told", "Plain")]
    assert [env.told for env in built] == [40, None]
    with pytest.raises(UserCodeFault, match="environment told_envs.Leaves cannot be built: SystemExit: 3"):
        make_environment({"_target_": "told_envs.Leaves"}, None, seed=0, total_steps=40)


@pytest.mark.parametrize("text, words", [
    ("import sys\nsys.exit()\n", "ends Python while it is imported"), ("1 / 0\n", "ZeroDivisionError: division by zero"),
    ("import os\nos.chdir('/')\nraise KeyError('x')\n", "KeyError: 'x'")])
def test_a_module_of_an_environment_that_fails_to_import_names_its_key(tmp_path, monkeypatch, text, words):
    name = f"broken_env_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"env._target_ = '{name}.Env': cannot import {name} .*{words}"):
        make_environment({"_target_": f"{name}.Env"}, None, seed=0, total_steps=0)
