import pytest
from harmony import encode_with_special

from grpo.batch import Completion, Segment
from grpo.envs.carry import Carry, build_tokenizer, demonstration, implied_answer, needs_carry

SETTINGS = {
    "digits": 2,
    "format_reward": 0.1,
    "fault_rate": 0.75,
    "keep_no_carry": 0.35,
    "held_out_fraction": 0.2,
    "num_eval_prompts": 256,
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def env(tokenizer):
    return Carry(tokenizer=tokenizer, seed=0, **SETTINGS)


def make(tokenizer, **changes):
    return Carry(tokenizer=tokenizer, **{"seed": 0, **SETTINGS, **changes})


def question_prompt(env, question, answer, carries):
    prompt = env.eval_prompts()[0]
    prompt.row = {"question": question, "answer": answer, "needs_carry": carries}
    return prompt


def score_text(env, text, *, question="14+49", answer="63", carries=True, finish_reason="stop"):
    prompt = question_prompt(env, question, answer, carries)
    segments = [Segment(prompt.token_ids, "prompt"), Segment(encode_with_special(env.tokenizer, text), "policy")]
    return env.score([Completion(prompt, 0, segments, finish_reason)])[0]


RIGHT = "<|channel|>analysis<|message|>4+9=13,1+4+1=6<|end|><|start|>assistant<|channel|>final<|message|>63<|return|>"


def test_a_prompt_is_a_user_message_and_the_assistants_start(env, tokenizer):
    text = tokenizer.decode(env.encode_prompt("14+49"), keep_special=True)
    assert text == "<|start|>user<|message|>14+49<|end|><|start|>assistant"


def test_a_completion_reasons_in_analysis_and_answers_in_final(env, tokenizer):
    ids = env.encode_completion("4+9=13,1+4+1=6", "63")
    assert tokenizer.decode(ids, keep_special=True) == RIGHT
    assert ids == encode_with_special(tokenizer, RIGHT)


@pytest.mark.parametrize(
    ("a", "b", "forgets", "expected"),
    [
        (14, 49, False, ("4+9=13,1+4+1=6", "63")),
        (14, 49, True, ("4+9=13,1+4=5", "53")),
        (79, 71, False, ("9+1=10,7+7+1=15", "150")),
        (79, 71, True, ("9+1=10,7+7=14", "140")),
        (12, 34, False, ("2+4=6,1+3=4", "46")),
        (12, 34, True, ("2+4=6,1+3=4", "46")),
        (195, 907, False, ("5+7=12,9+0+1=10,1+9+1=11", "1102")),
        (195, 907, True, ("5+7=12,9+0=9,1+9=10", "1092")),
    ],
)
def test_demonstrations_show_the_column_sums(a, b, forgets, expected):
    assert demonstration(a, b, forgets_carry=forgets) == expected


def test_the_reasoning_of_the_honest_teacher_gives_the_sum():
    for a, b in [(10, 10), (55, 45), (99, 99), (90, 10), (19, 81), (555, 445)]:
        analysis, answer = demonstration(a, b, forgets_carry=False)
        assert answer == str(a + b) == implied_answer(analysis)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (14, 49, True),
        (12, 34, False),
        (90, 90, False),
        (95, 95, True),
        (150, 160, True),
        (155, 145, True),
        (910, 910, False),
    ],
)
def test_a_carry_out_of_the_leading_column_is_no_carry(a, b, expected):
    assert needs_carry(a, b) is expected


def test_seventy_percent_of_the_problems_carry_and_the_teacher_forgets_three_in_four(env, tokenizer):
    num_carry = num_wrong = num = 0
    for step in range(60):
        for prompt_ids, completion_ids in env.demonstrations(step, 64):
            question = tokenizer.decode(prompt_ids).removeprefix("user").removesuffix("assistant")
            a, b = map(int, question.split("+"))
            answer = tokenizer.decode(completion_ids).rpartition("final")[2]
            num += 1
            num_carry += needs_carry(a, b)
            num_wrong += answer != str(a + b)
            assert needs_carry(a, b) or answer == str(a + b)
    # 0.45 of the pairs carry; 0.45 / (0.45 + 0.55 * 0.35) = 0.7004. Standard errors 0.0074 and 0.0084 at 3840 problems
    assert num_carry / num == pytest.approx(0.7004, abs=0.03)
    assert num_wrong / num_carry == pytest.approx(0.75, abs=0.03)


def test_prompts_are_a_pure_function_of_seed_step_and_attempt(tokenizer):
    def questions(seed, step, attempt=0, num_prompts=16):
        prompts = make(tokenizer, seed=seed).prompts(step, num_prompts=num_prompts, attempt=attempt)
        return [prompt.row["question"] for prompt in prompts]

    base = questions(3, 7)
    assert base == questions(3, 7)
    assert len({tuple(base), tuple(questions(4, 7)), tuple(questions(3, 8)), tuple(questions(3, 7, 1))}) == 4


def test_prompt_ids_are_unique_across_attempts(env):
    ids = [prompt.id for attempt in range(3) for prompt in env.prompts(5, num_prompts=16, attempt=attempt)]
    assert ids == list(range(48))


def test_held_out_problems_never_occur_in_training_in_either_order(env, tokenizer):
    held_out = {prompt.row["question"] for prompt in env.eval_prompts()}
    held_out |= {"+".join(reversed(question.split("+"))) for question in held_out}
    trained = {prompt.row["question"] for step in range(200) for prompt in env.prompts(step, num_prompts=16)}
    trained |= {
        tokenizer.decode(ids).removeprefix("user").removesuffix("assistant")
        for step in range(100)
        for ids, _ in env.demonstrations(step, 64)
    }
    assert len(trained) > 3000
    assert not trained & held_out


def test_a_fifth_of_the_pairs_is_held_out(env):
    share = sum(env.is_held_out({"question": f"{a}+{b}"}) for a in range(10, 100) for b in range(10, 100)) / 8100
    assert share == pytest.approx(0.2, abs=0.02)  # 4095 independent pairs: standard error 0.009


def test_the_evaluation_problems_are_the_same_for_every_seed(tokenizer):
    first, second = (make(tokenizer, seed=seed).eval_prompts() for seed in (0, 1))
    assert [p.row for p in first] == [p.row for p in second]
    assert len({p.row["question"] for p in first}) == len(first) == 256


def test_the_right_answer_earns_one_and_the_format_a_tenth(env):
    score = score_text(env, RIGHT)
    assert score.reward == pytest.approx(1.1)
    assert score.parts == {"exact_match": 1.0, "format": 1.0}
    assert score.is_correct is True
    assert score.metrics == {
        "reasoning_correct": 1.0,
        "reasoning_consistent": 1.0,
        "accuracy_carry": 1.0,
        "forgets_carry": 0.0,
    }


def test_a_forgotten_carry_earns_the_format_only_and_is_measured(env):
    score = score_text(env, RIGHT.replace("4+1=6", "4=5").replace(">63<", ">53<"))
    assert score.reward == pytest.approx(0.1)
    assert score.is_correct is False
    assert score.metrics == {
        "reasoning_correct": 0.0,
        "reasoning_consistent": 1.0,
        "accuracy_carry": 0.0,
        "forgets_carry": 1.0,
    }


def test_an_answer_against_its_own_reasoning_is_inconsistent(env):
    score = score_text(env, RIGHT.replace("4+1=6", "4=5"))
    assert score.is_correct is True
    assert score.metrics["reasoning_consistent"] == 0.0


def test_problems_without_a_carry_are_measured_apart(env):
    text = RIGHT.replace("4+9=13,1+4+1=6", "2+4=6,1+3=4").replace(">63<", ">46<")
    score = score_text(env, text, question="12+34", answer="46", carries=False)
    assert score.metrics["accuracy_no_carry"] == 1.0
    assert "accuracy_carry" not in score.metrics


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (RIGHT.removesuffix("<|return|>"), 0.0),  # cut off: 63 may have become 631
        (RIGHT.replace("<|return|>", "<|end|>"), 0.0),
        ("63", 0.0),
        ("", 0.0),
        ("<|return|>", 0.0),
        ("<|channel|>", 0.0),
        ("<|channel|>final<|message|><|return|>", 0.0),
        ("<|channel|>analysis<|message|>63<|return|>", 0.0),  # the answer stands in the reasoning only
        (
            "<|channel|>final<|message|>53<|end|><|start|>assistant<|channel|>final<|message|>63<|return|>",
            0.0,
        ),  # two answers
        ("<|channel|>final<|message|>63<|return|>", 1.1),
        ("<|channel|>final <|constrain|>json<|message|>63<|return|>", 1.1),
        ("<|channel|>final to=functions.f<|message|>63<|return|>", 0.0),
        ("<|channel|>final<|message|>63<|call|>", 0.0),
        ("<|channel|>finale<|message|>63<|return|>", 0.0),
        (RIGHT.replace("assistant", "user"), 0.0),
        ("<|channel|>final<|message|>063<|return|>", 0.1),
        ("<|channel|>final<|message|>63 <|return|>", 0.0),
        ("<|channel|>final<|message|>14+49<|return|>", 0.0),
    ],
)
def test_only_one_finished_final_answer_counts(env, text, reward):
    assert score_text(env, text).reward == pytest.approx(reward)


def test_random_ids_never_raise(env):
    import random

    rng = random.Random(0)
    prompt = env.eval_prompts()[0]
    completions = []
    for _ in range(300):
        ids = [rng.randrange(env.tokenizer.vocab_size + 5) for _ in range(rng.randrange(40))]
        completions.append(
            Completion(prompt, 0, [Segment(prompt.token_ids, "prompt"), Segment(ids, "policy")], "length")
        )
    assert max(score.reward for score in env.score(completions)) <= 0.1


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"digits": 1}, "env.digits"),
        ({"digits": 10}, "env.digits"),
        ({"fault_rate": 1.5}, "env.fault_rate"),
        ({"keep_no_carry": -0.1}, "env.keep_no_carry"),
        ({"held_out_fraction": 0.0}, "env.held_out_fraction"),
        ({"held_out_fraction": 1.0}, "env.held_out_fraction"),
        ({"format_reward": 1.0}, "env.format_reward"),
        ({"num_eval_prompts": 0}, "env.num_eval_prompts"),
        ({"num_eval_prompts": 5000}, "env.num_eval_prompts"),
    ],
)
def test_values_out_of_range_name_their_key(tokenizer, changes, key):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        make(tokenizer, **changes)


def test_three_digit_problems_work(tokenizer):
    env = make(tokenizer, digits=3)
    a, b = map(int, env.eval_prompts()[0].row["question"].split("+"))
    assert 100 <= min(a, b) and max(a, b) <= 999
    prompt = env.eval_prompts()[0]
    ids = env.encode_completion(*demonstration(a, b, forgets_carry=False))
    score = env.score([Completion(prompt, 0, [Segment(prompt.token_ids, "prompt"), Segment(ids, "policy")], "stop")])[0]
    assert score.reward == pytest.approx(1.1)
