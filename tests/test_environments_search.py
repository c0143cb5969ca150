import asyncio
import json
import random
from pathlib import Path

import pytest

from trimtab.environments.base import Message, ToolCall
from trimtab.environments.files import Document, read_documents
from trimtab.environments.tools import search
from trimtab.environments.tools.corpus import COUNTS, RELATIONS, World, generate, sentence
from trimtab.environments.tools.search import (
    PAGE,
    SNIPPET,
    SearchIndex,
    SearchTask,
    open_index,
    paginate,
    search_tools,
    snippet,
)
from trimtab.environments.tools.tool import call

DOCUMENTS = [
    Document("a", "Apples", "Apples grow on trees."),
    Document("b", "Boats", "A boat floats. The boat is made of trees."),
    Document("c", "城市", "北京是中国的首都。"),
    Document("d", "Apples", "Apples grow on trees."),
]
TASK = SearchTask()
LONG = SearchTask(ask=World.total, filler=800, page=1200, max_messages=99)


def found(query: str, k: int = 5) -> list[str]:
    return [hit.id for hit in SearchIndex(DOCUMENTS).search(query, k)]


def test_search_ranks_by_the_words_shared_and_breaks_ties_by_position():
    assert found("apples") == ["a", "d"]
    assert found("BOAT trees")[0] == "b" and set(found("boat trees")) == {"a", "b", "d"}
    assert found("trees", k=1) == ["a"]
    assert found("北京") == ["c"]
    assert found("nothing here") == found("") == found("?!") == []


def test_scores_are_those_of_bm25():
    """Lucene's: ln(1 + (N - n + 0.5) / (n + 0.5)) * f / (f + k1 * (1 - b + b * length / mean length)).

    N = 2 documents of the same length, n = 1 of them with the word, f = 1 time: ln 2 / 2.5.
    """
    index = SearchIndex([Document("a", "", "one two"), Document("b", "", "three four")])
    (hit,) = index.search("one")
    assert hit.score == pytest.approx(0.693147 * 1 / (1 + 1.5), rel=1e-5)


def test_a_snippet_is_the_stretch_with_most_of_the_words():
    text = "red " + "x " * 300 + "red and blue " + "y " * 300
    assert snippet(text, ["blue", "red"]).startswith("red and blue") and len(snippet(text, ["red"])) <= SNIPPET
    assert snippet("all of it", ["it"]) == "all of it"


def test_pages_join_to_the_text_and_no_page_is_too_long():
    rng = random.Random(1)
    for size in (PAGE, 50) * 25:
        text = "".join(rng.choice("abc \n") * rng.choice((1, 1, 7, 900)) for _ in range(rng.randrange(60)))
        pages = paginate(text, size)
        assert "".join(pages) == text and all(0 < len(page) <= size for page in pages if text)
    assert paginate("") == [""]
    assert paginate("one two\n\nthree four", 12) == ["one two\n\n", "three four"]
    assert paginate("a\n\nthree four five", 12) == ["a\n\nthree ", "four five"]


def answer(tools, name: str, **arguments) -> str:
    return asyncio.run(call(tools, ToolCall(name, arguments)))


def test_the_tools_search_and_open_pages():
    tools = search_tools(SearchIndex([*DOCUMENTS, Document("long", "Long", "word " * 1000)]))
    assert answer(tools, "search", query="boat", k=1) == "[b] Boats: A boat floats. The boat is made of trees."
    assert answer(tools, "search", query="zebra") == "no document has any of these words"
    assert answer(tools, "open", id="a") == "Apples grow on trees."
    assert answer(tools, "open", id="long", page=3).endswith("\n[page 3 of 3]")
    assert answer(tools, "open", id="long", page=4) == "error: long has pages 1 to 3, got 4"
    assert answer(tools, "open", id="z").startswith("error: no document 'z'")
    assert answer(tools, "search", query="boat", k=0).startswith("error: k: ")


def test_an_index_is_built_once_and_loaded_afterwards(tmp_path, monkeypatch):
    built = SearchIndex(DOCUMENTS, cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    monkeypatch.setattr(search, "_build", None)  # whoever builds now fails
    loaded = SearchIndex(DOCUMENTS, cache=tmp_path)
    assert loaded.search("boat trees 北京") == built.search("boat trees 北京") and list(tmp_path.iterdir()) == [folder]
    with pytest.raises(TypeError):
        SearchIndex(DOCUMENTS[:2], cache=tmp_path)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_documents_come_from_jsonl_and_from_folders_of_text(tmp_path):
    rows = [{"id": d.id, "title": d.title, "text": d.text} for d in DOCUMENTS]
    path = written(tmp_path, "corpus.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    assert read_documents(path) == DOCUMENTS
    assert open_index(path, cache=tmp_path / "cache").search("boat")[0].id == "b"
    written(tmp_path, "texts/deep/one.md", "first")
    written(tmp_path, "texts/two.txt", "second")
    assert read_documents(tmp_path / "texts") == [
        Document("deep/one.md", "one", "first"),
        Document("two.txt", "two", "second"),
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            '{"id": "a", "title": "t", "text": "x"}\n{"id": "b", "text": "x"}',
            "corpus.jsonl:2: field 'title' is missing",
        ),
        ('{"id": 3, "title": "t", "text": "x"}', "corpus.jsonl:1: field 'id' must be a text, got 3"),
        ('{"id": "a", "title": "t", "text": "x"}\n' * 2, "corpus.jsonl:2: id 'a' was already used at .*:1"),
        ("[1]", "corpus.jsonl:1: a line holds a JSON object, got list"),
        ("\n{", "corpus.jsonl:2: not JSON"),
        ("", "no documents"),
    ],
)
def test_what_is_wrong_with_a_corpus_is_told_with_file_and_line(tmp_path, text, told):
    with pytest.raises(ValueError, match=told):
        read_documents(written(tmp_path, "corpus.jsonl", text))


def test_an_index_of_nothing_is_refused():
    for documents in ([], [Document("a", "", "?")], [DOCUMENTS[0]] * 2):
        with pytest.raises(ValueError, match=r"at least one|no word|unique"):
            SearchIndex(documents)


def test_the_world_depends_on_its_seed_alone_and_every_link_leads_to_a_page():
    world = generate(3)
    assert world == generate(3) != generate(4)
    assert len(world.entities) == len({entity.id for entity in world.entities.values()}) == sum(COUNTS.values())
    for entity in world.entities.values():
        for relation in RELATIONS[entity.kind]:
            if relation.kind:
                assert world.entities[entity.facts[relation.name]].kind == relation.kind


@pytest.mark.parametrize("hops", [1, 2, 5])
def test_every_page_on_the_way_names_the_next_and_the_last_one_the_answer(hops):
    pages = {document.title: document.text for document in TASK.world.documents()}
    rng = random.Random(1)
    for _ in range(100):
        question = TASK.world.question(rng, hops=hops)
        named = [*(entity.name for entity in question.entities[1:]), question.answer]
        assert len(named) == hops == len(question.relations) and question.entities[0].name in question.text
        for entity, relation, name in zip(question.entities, question.relations, named, strict=True):
            assert name in sentence(entity, relation) and sentence(entity, relation) in pages[entity.name]


def test_a_total_takes_a_number_of_each_page():
    rng = random.Random(1)
    for _ in range(100):
        question = TASK.world.total(rng, count=3)
        numbers = [int(one.facts[name]) for one, name in zip(question.entities, question.relations, strict=True)]
        assert len({entity.id for entity in question.entities}) == 3 and question.answer == str(sum(numbers))
        assert all(entity.name in question.text for entity in question.entities)


def test_on_long_pages_each_fact_stands_alone_on_a_page_of_its_own():
    for entity in list(LONG.world.entities.values())[::7]:
        _, count = LONG.index.page(entity.id)
        pages = [LONG.index.page(entity.id, page)[0] for page in range(1, count + 1)]
        for relation in RELATIONS[entity.kind]:
            (found,) = [page for page in pages if sentence(entity, relation.name) in page]
            assert len(found) > 800 and sum(sentence(entity, one.name) in found for one in RELATIONS[entity.kind]) == 1
        assert LONG.index.search(entity.name)[0].id == entity.id


def test_every_entity_is_found_first_by_its_name():
    missed = [e.name for e in TASK.world.entities.values() if TASK.index.search(e.name)[0].id != e.id]
    assert missed == []


@pytest.mark.parametrize("task", [TASK, LONG], ids=["two hops", "a total of long pages"])
def test_a_demonstration_replays_in_its_environment_and_earns_full_reward(task):
    async def replay(env, conversation) -> dict[str, float]:
        assert await env.start() == conversation[:2]
        i = 2
        while True:
            step = await env.step(conversation[i])
            if step.done:
                return dict(step.rewards)
            assert step.replies == conversation[i + 1 : i + 1 + len(step.replies)]
            i += 1 + len(step.replies)

    for seed in range(30):
        conversation = task.demonstrate(random.Random(seed))
        env = task.sample(random.Random(seed))()
        assert asyncio.run(replay(env, conversation)) == {"outcome": 1.0}


def test_a_wrong_answer_earns_nothing():
    for text in ("", "no idea", "1 or 2"):
        step = asyncio.run(TASK.sample(random.Random(1))().step(Message("assistant", text)))
        assert step.done and step.rewards == {"outcome": 0.0}


def test_held_out_questions_are_never_trained_on():
    rng = random.Random(2)
    asked = {split: {TASK.sample(rng, held_out=split)().prompt for _ in range(400)} for split in (False, True)}
    assert not asked[False] & asked[True]
