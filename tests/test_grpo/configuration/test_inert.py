"""A key that cannot act is refused where it was set, and is no hindrance where it was not."""
import pytest

from grpo.config import ConfigError
from grpo.configuration.inert import DEPENDENT
from grpo.configuration.launch import load_config

# key=value -> what lets it act
CASES = {
    "corrections.level=sequence": ["corrections.weight=truncate"], "corrections.low=0.5": ["corrections.weight=mask"],
    "corrections.high=5": ["corrections.weight=truncate"], "entropy.step=0.01": ["entropy.target=0.3"],
    "kl.reference=base": ["kl.coefficient=0.1"], "rollout.overlong_penalty=0.5": ["rollout.overlong_buffer=4"],
    "optim.decay_steps=5": ["optim.schedule=linear"], "optim.whole_prompts=true": ["optim.minibatches=2"],
    "optim.sums_log_probs=true": ["loss=dpo"],
    "curriculum.window=3": ["curriculum.retire_at=0.9"], "curriculum.target=0.3": ["curriculum.candidates=2"],
    "eval.top_k=5": ["eval.num_samples=1"], "eval.top_p=0.9": ["eval.num_samples=1"], "eval.min_p=0.1": ["eval.num_samples=1"]}
OFF = {"eval": ["eval.num_samples=0"], "optim": ["optim.schedule=constant"]}


def test_each_dependent_key_has_a_case():
    assert [case.key for case in DEPENDENT] == [word.split("=")[0] for word in CASES]


@pytest.mark.parametrize("word, switch", CASES.items())
def test_a_key_without_its_switch_is_refused_by_name(word, switch):
    key, _, value = word.partition("=")
    off = OFF.get(key.split(".")[0], [])
    with pytest.raises(ConfigError, match=f"{key} = .*: changes nothing without") as caught:
        load_config("train", [*off, word])
    assert switch[0].split("=")[0] in str(caught.value)
    load_config("train", [*off, *switch, word])
    load_config("train", off)


def test_evaluations_that_are_off_need_no_empty_settings():
    load_config("train", ["eval.every=0", "eval.at_start=false", "eval.at_end=false", "eval.num_samples=0", "eval.top_p=0.9"])


@pytest.mark.parametrize("words, part", [
    (["checkpoint.best=eval/greedy_acuracy"], r"'eval/greedy_acuracy'.*did you mean eval/greedy_accuracy\? There are eval/"),
    (["checkpoint.best=eval/greedy_accuracy", "eval.greedy=false"], "no metric that the evaluation reports"),
    (["checkpoint.best=eval/pass@8", "eval.num_samples=4"], "no metric that the evaluation reports"),
    (["checkpoint.best=eval/avg@8", "eval.num_samples=4"], "no metric that the evaluation reports")])
def test_the_best_checkpoint_s_metric_is_checked_at_the_start(words, part):
    with pytest.raises(ConfigError, match=f"checkpoint.best = .*{part}"):
        load_config("train", words)


@pytest.mark.parametrize("best", ["eval/greedy_accuracy", "eval/avg@4", "eval/pass@2", "eval/reward", "eval/my_metric", "null"])
def test_a_metric_that_there_may_be_is_taken(best):
    load_config("train", [f"checkpoint.best={best}", "eval.num_samples=4"])


def test_evaluations_of_data_have_metrics_of_their_own():
    for best in ("eval/accuracy", "eval/perplexity"):
        load_config("train", ["+experiment=dpo_20b", "env.path=x.jsonl", f"checkpoint.best={best}", "eval.objective=accuracy"])
    with pytest.raises(ConfigError, match="checkpoint.best = 'eval/accuracy': .*did you mean eval/greedy_accuracy"):
        load_config("train", ["checkpoint.best=eval/accuracy"])


def test_several_answers_are_for_questions_from_a_file():
    with pytest.raises(ConfigError, match="num_samples = 4: goes with prompts=FILE"):
        load_config("generate", ["run=runs/x", "num_samples=4"])


def test_a_word_is_shown_as_it_was_typed():
    with pytest.raises(ConfigError, match="kl.reference = 'base': changes nothing without"):
        load_config("train", ["kl.reference=base"])
