import asyncio
import importlib.util
import json
import random

import pytest
from reasoning_gym.composite import DatasetSpec

from trimtab.environments import files
from trimtab.environments.adapters.datasets import GymTask, RowsTask, gym_names, verifiers_task
from trimtab.environments.base import Message, ToolCall, VoidEpisode


def rewards(env, content: str) -> dict[str, float]:
    step = asyncio.run(env.step(Message("assistant", content)))
    assert step.done
    return dict(step.rewards)


@pytest.mark.parametrize("name", ["chain_sum", "syllogism", "sudoku", "word_sorting", "number_format", "leg_counting"])
def test_a_gym_dataset_gives_full_marks_to_its_own_answer_and_none_to_rubbish(name):
    task, seed = GymTask(name), 3
    question, said = task.demonstrate(random.Random(seed))
    env = task.sample(random.Random(seed))()
    assert asyncio.run(env.start()) == (question,)
    assert rewards(env, said.content)["outcome"] == 1.0
    assert rewards(task.sample(random.Random(seed))(), "I cannot say {[(")["outcome"] == 0.0


def test_a_partial_mark_is_logged_and_earns_no_outcome():
    task = GymTask("chain_sum")
    _, said = task.demonstrate(random.Random(1))
    marks = rewards(task.sample(random.Random(1))(), f"it is {said.content}, or 7")
    assert marks["outcome"] == 0.0 and 0.0 <= marks["verifier"] < 1.0


def test_every_name_makes_a_task_which_gives_full_marks_to_its_own_answer():
    assert len(gym_names()) > 100
    without = set()
    for name in gym_names():
        task = GymTask(name, size=20)
        env = task.sample(random.Random(1))()
        assert asyncio.run(env.start())[-1].content
        try:
            _, said = task.demonstrate(random.Random(1))
        except ValueError:
            without.add(name)
            continue
        assert rewards(env, said.content)["outcome"] == 1.0, name
    assert without == {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


def test_a_mixture_of_gym_datasets_is_one_too():
    parts = [DatasetSpec(name=name, weight=1.0, config={}) for name in ("gcd", "lcm")]
    task = GymTask("composite", datasets=parts)
    texts = [task.demonstrate(random.Random(seed))[0].content for seed in range(20)]
    assert {"Greatest" in text for text in texts} == {True, False}
    _, said = task.demonstrate(random.Random(1))
    assert rewards(task.sample(random.Random(1))(), said.content)["outcome"] == 1.0
    with pytest.raises(ValueError, match="composite refuses"):
        GymTask("composite")


def test_held_out_questions_of_a_gym_dataset_are_never_trained_on():
    task, rng = GymTask("gcd"), random.Random(5)
    asked = {split: {task.sample(rng, held_out=split)().prompt for _ in range(400)} for split in (False, True)}
    assert asked[True] and not asked[False] & asked[True]


def test_what_a_gym_dataset_cannot_do_is_told():
    with pytest.raises(ValueError, match="no dataset 'gdc'; there are ab, acre"):
        GymTask("gdc")
    with pytest.raises(ValueError, match=r"gcd refuses size 1000 and options \{'min_value': 9, 'max_value': 1\}"):
        GymTask("gcd", min_value=9, max_value=1)
    with pytest.raises(ValueError, match="gcd refuses"):
        GymTask("gcd", no_such_option=1)
    with pytest.raises(ValueError, match="no held-out question among 1; raise size"):
        [GymTask("gcd", size=1, seed=seed).sample(random.Random(1), held_out=True) for seed in range(8)]
    with pytest.raises(ValueError, match="no answers to demonstrate"):
        GymTask("graph_color").demonstrate(random.Random(1))


def exact(message: Message, row) -> dict[str, float]:
    return {"outcome": float(message.content == row["answer"])}


def file_of(folder, lines) -> str:
    path = folder / "tasks.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_rows_of_a_file_become_tasks_scored_by_the_users_reward(tmp_path):
    path = file_of(tmp_path, [{"q": f"question {i}", "answer": str(i)} for i in range(50)])
    task, rng = RowsTask(path, exact, prompt="q", system="Be brief."), random.Random(1)
    asked = {False: set(), True: set()}
    for split in asked:
        for _ in range(200):
            env = task.sample(rng, held_out=split)()
            asked[split].add(env.prompt)
            assert rewards(env, env.prompt.split()[1]) == {"outcome": 1.0}
    assert len(asked[False] | asked[True]) == 50 and not asked[False] & asked[True]
    system, user, said = task.demonstrate(rng)
    assert system.content == "Be brief." and user.content == f"question {said.content}"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"prompt": "b"}, r"tasks.jsonl:2: field 'answer' is missing or null; the fields are 'prompt'"),
        ({"prompt": " ", "answer": "b"}, r"tasks.jsonl:2: field 'prompt' must be a text, got ' '"),
        ({"answer": "b"}, r"tasks.jsonl:2: field 'prompt' is missing"),
        ("{'prompt'", r"tasks.jsonl:2: not JSON"),
    ],
)
def test_what_is_wrong_with_a_row_is_told_with_file_line_and_field(tmp_path, line, told):
    with pytest.raises(ValueError, match=told):
        RowsTask(file_of(tmp_path, [{"prompt": "a", "answer": "a"}, line]), exact)


def test_a_file_without_rows_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        RowsTask(file_of(tmp_path, []), exact)
    (tmp_path / "tasks.csv").write_text("prompt,answer")
    with pytest.raises(ValueError, match=r"\.jsonl and \.parquet"):
        RowsTask(tmp_path / "tasks.csv", exact)
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl: no such file"):
        RowsTask(tmp_path / "missing.jsonl", exact)
    with pytest.raises(ValueError, match="no held-out row"):
        RowsTask(file_of(tmp_path, [{"prompt": "a", "answer": "a"}]), exact).sample(random.Random(1), held_out=True)


def test_parquet_without_pyarrow_is_refused_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "tasks.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        RowsTask(tmp_path / "tasks.parquet", exact)


def test_parquet_reads_like_jsonl(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = [{"prompt": f"question {i}", "answer": str(i)} for i in range(20)]
    parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "tasks.parquet")
    assert [row.values for row in files.read_rows(tmp_path / "tasks.parquet")] == values
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="not a Parquet file"):
        RowsTask(tmp_path / "broken.parquet", exact)


def test_verifiers_that_is_not_installed_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        verifiers_task("wordle")


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: One number.
        b: Another number.
    """
    return a + b


def environment_of_verifiers(kind: str, **options):
    vf = pytest.importorskip("verifiers")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)])

    def right(completion, answer) -> float:
        return float(completion[-1]["content"] == answer)

    rubric = vf.Rubric(funcs=[right], weights=[2.0])
    return getattr(vf, kind)(dataset=data, rubric=rubric, system_prompt="Be brief.", **options)


def test_a_single_turn_environment_of_verifiers_is_played_and_scored_by_its_rubric():
    async def play():
        env = verifiers_task(environment_of_verifiers("SingleTurnEnv")).sample(random.Random(1))()
        system, user = await env.start()
        assert (system.role, system.content, user.role) == ("system", "Be brief.", "user")
        return await env.step(Message("assistant", str(int(user.content.split()[2]) + 1), "easy"))

    step = asyncio.run(play())
    assert step.done and step.rewards["outcome"] == 2.0 and step.rewards["right"] == 1.0


def test_a_tool_environment_of_verifiers_runs_its_tools_between_the_policys_messages():
    async def play():
        env = verifiers_task(environment_of_verifiers("ToolEnv", tools=[add], max_turns=5)).sample(random.Random(2))()
        system, user = await env.start()
        assert system.content == "Be brief."
        assert [(offer["name"], offer["description"]) for offer in system.tools] == [("add", "Add two numbers.")]
        number = int(user.content.split()[2])
        calls = (ToolCall("add", {"a": number, "b": 1}), ToolCall("add", {"a": 0, "b": 0}))
        step = await env.step(Message("assistant", "", "adding", calls))
        assert not step.done and [(r.role, r.content) for r in step.replies] == [
            ("tool", str(number + 1)),
            ("tool", "0"),
        ]
        return await env.step(Message("assistant", step.replies[0].content))

    step = asyncio.run(play())
    assert step.done and step.rewards["outcome"] == 2.0


def test_an_environment_of_verifiers_that_breaks_voids_the_episode_and_close_ends_a_rollout():
    vf = pytest.importorskip("verifiers")

    class Broken(vf.MultiTurnEnv):
        async def env_response(self, messages, state, **kwargs):
            raise RuntimeError("no server")

    environment = environment_of_verifiers("SingleTurnEnv")
    broken = Broken(dataset=environment.get_dataset(), rubric=environment.rubric, max_turns=4)

    async def play():
        env = verifiers_task(broken).sample(random.Random(1))()
        await env.start()
        with pytest.raises(VoidEpisode, match="no server"):
            await env.step(Message("assistant", "hello"))
        left = verifiers_task(environment).sample(random.Random(1))()
        await left.start()
        await left.close()
        return asyncio.all_tasks()

    assert len(asyncio.run(play())) == 1


def test_an_installed_environment_of_the_hub_is_found_by_its_name(tmp_path, monkeypatch):
    pytest.importorskip("verifiers")
    (tmp_path / "hub_sums.py").write_text(
        "import datasets, verifiers\n"
        "def load_environment(count: int):\n"
        "    rows = [{'question': f'{i} + 1?', 'answer': str(i + 1)} for i in range(count)]\n"
        "    def right(completion, answer): return float(completion[-1]['content'] == answer)\n"
        "    rubric = verifiers.Rubric(funcs=[right])\n"
        "    return verifiers.SingleTurnEnv(dataset=datasets.Dataset.from_list(rows), rubric=rubric)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    async def play():
        env = verifiers_task("hub-sums", count=30).sample(random.Random(1))()
        (user,) = await env.start()
        return await env.step(Message("assistant", str(int(user.content.split()[0]) + 1)))

    assert asyncio.run(play()).rewards["outcome"] == 1.0


def test_splits_of_a_verifiers_environment_are_disjoint():
    task, rng = verifiers_task(environment_of_verifiers("SingleTurnEnv")), random.Random(1)

    async def asked(split):
        env = task.sample(rng, held_out=split)()
        text = (await env.start())[-1].content
        await env.close()
        return text

    async def both():
        return [{await asked(split) for _ in range(60)} for split in (False, True)]

    trained, held_out = asyncio.run(both())
    assert trained and held_out and not trained & held_out
