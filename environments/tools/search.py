"""Search over a corpus: a BM25 index with tools to search and to open pages, and questions over a generated world.

An index is built once for a corpus, kept on disk under the hash of its documents, and shared by all episodes. Words are
runs of letters and digits in lower case; a Chinese or Japanese character is a word of its own.
"""

import hashlib
import os
import random
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import bm25s
import numpy as np
from pydantic import Field

from trimtab.environments.base import Message, ToolCall
from trimtab.environments.files import Document, read_documents
from trimtab.environments.split import is_held_out
from trimtab.environments.tools.corpus import Question, World, generate, sentence
from trimtab.environments.tools.functions import FunctionTool, ToolEnv, tool
from trimtab.environments.tools.tool import opening

PAGE = 2_000
"""Characters of one page of a document, at most."""
SNIPPET = 200
"""Characters of a snippet, at most."""
MAX_HITS = 20

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W_{_IDEOGRAPHS}]+")
_FORMAT = "1"
"""Part of a cached index's key; changes with what counts as a word."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One result of a search; a higher score matches better."""

    id: str
    title: str
    snippet: str
    score: float


class SearchIndex:
    """A BM25 index over documents (Lucene's variant, k1 = 1.5, b = 0.75); title and text count alike.

    Args:
        cache: the folder that keeps indices; nothing is kept when None.
        page: characters of one page of a document, at most.

    Raises:
        ValueError: no documents, an id that comes twice, documents without any word.
    """

    def __init__(self, documents: Sequence[Document], *, cache: Path | None = None, page: int = PAGE) -> None:
        self.documents = tuple(documents)
        self._by_id = {document.id: document for document in self.documents}
        self._page = page
        if not self.documents:
            raise ValueError("an index needs at least one document")
        if len(self._by_id) < len(self.documents):
            raise ValueError(f"{len(self.documents)} documents have {len(self._by_id)} ids; ids are unique")
        self._bm25 = _build(self.documents) if cache is None else _cached(self.documents, cache)

    def search(self, query: str, k: int = 5) -> list[Hit]:
        """The k best documents that share a word with the query; of equals, the earlier document comes first."""
        asked = sorted(set(words(query)) & self._bm25.vocab_dict.keys())
        if not asked:
            return []
        scores = self._bm25.get_scores(asked)
        matching = np.flatnonzero(scores > 0)
        best = matching[np.argsort(-scores[matching], kind="stable")[:k]]
        found = [(self.documents[i], float(scores[i])) for i in best]
        return [Hit(doc.id, doc.title, snippet(doc.text, asked), score) for doc, score in found]

    def page(self, id: str, page: int = 1) -> tuple[str, int]:
        """The text of one page of a document, counted from 1, and how many pages there are.

        Raises:
            ValueError: no such document or page.
        """
        if id not in self._by_id:
            raise ValueError(f"no document {id!r}; ids come from search")
        pages = paginate(self._by_id[id].text, self._page)
        if not 1 <= page <= len(pages):
            raise ValueError(f"{id} has pages 1 to {len(pages)}, got {page}")
        return pages[page - 1], len(pages)


def open_index(path: Path | str, *, cache: Path | None = None) -> SearchIndex:
    """The index of the documents at path (see rows.read_documents); kept in cache or ~/.cache/trimtab/search."""
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab" / "search"
    return SearchIndex(read_documents(path), cache=cache or kept)


def words(text: str) -> list[str]:
    """The words of a text.

    >>> words("BM25 ranks 北京!")
    ['bm25', 'ranks', '北', '京']
    """
    return _WORD.findall(text.lower())


def snippet(text: str, asked: Sequence[str]) -> str:
    """The stretch of a text, at most SNIPPET characters, with most different words of asked; of equals, the first."""
    wanted = frozenset(asked)
    matches = [(match.start(), match.end(), match[0].lower()) for match in _WORD.finditer(text)]
    matches = [match for match in matches if match[2] in wanted]
    best, begin = 0, 0
    for i, start in enumerate((0, *(start for start, _, _ in matches))):
        first = max(0, i - 1)
        nearby = matches[first : first + SNIPPET]  # a stretch cannot hold more
        found = len({word for _, end, word in nearby if end <= start + SNIPPET})
        if found > best:
            best, begin = found, start
    begin = max(0, min(begin, len(text) - SNIPPET))
    return " ".join(text[begin : begin + SNIPPET].split())


def paginate(text: str, size: int = PAGE) -> list[str]:
    """A text in pages of at most size characters; one page at least.

    A page ends after a blank line in its second half, else after a space or line break, where there is one.

    >>> "".join(paginate("one two " * 700)) == "one two " * 700
    True
    """
    pages, start = [], 0
    while len(text) - start > size:
        end = start + size
        blank = text.rfind("\n\n", start + size // 2, end) + 2
        space = max(text.rfind(space, start, end) for space in " \n") + 1
        cut = blank if blank > 1 else space if space > start else end
        pages.append(text[start:cut])
        start = cut
    return [*pages, text[start:]]


def search_text(index: SearchIndex, query: str, k: int = 5) -> str:
    """What the tool search answers: a line for each hit."""
    hits = index.search(query, k)
    return "\n".join(f"[{hit.id}] {hit.title}: {hit.snippet}" for hit in hits) or "no document has any of these words"


def page_text(index: SearchIndex, id: str, page: int = 1) -> str:
    """What the tool open answers: the page, and a last line when there is more than one."""
    text, count = index.page(id, page)
    return text if count == 1 else f"{text}\n[page {page} of {count}]"


def search_tools(index: SearchIndex) -> tuple[FunctionTool, FunctionTool]:
    """Tools search(query, k) and open(id, page) over an index."""

    def search(query: str, k: Annotated[int, Field(ge=1, le=MAX_HITS)] = 5) -> str:
        """Search the documents; returns ids, titles and snippets, the best first.

        Args:
            query: Words to look for.
            k: Number of results.
        """
        return search_text(index, query, k)

    def open(id: str, page: int = 1) -> str:
        """Read a document.

        Args:
            id: A document's id, as search gives it.
            page: Number of the page, from 1.
        """
        return page_text(index, id, page)

    return tool(search), tool(open)


class SearchTask:
    """Questions over the world of a seed. Reward part "outcome": 1.0 for exactly the answer, else 0.0.

    Args:
        ask: draws a question; two hops by default. World.total and more hops take more pages.
        filler: characters around each fact (World.documents), which make pages long.
        page: characters of one page, at most.
        max_messages: assistant messages of one episode.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        ask: Callable[[World, random.Random], Question] = World.question,
        filler: int = 0,
        page: int = PAGE,
        max_messages: int = 12,
        cache: Path | None = None,
    ) -> None:
        self.world = generate(seed)
        self.index = SearchIndex(self.world.documents(filler=filler), cache=cache, page=page)
        self._ask = ask
        self._tools = search_tools(self.index)
        self._max_messages = max_messages

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], ToolEnv]:
        question = self._draw(rng, held_out=held_out)

        def reward(message: Message) -> Mapping[str, float]:
            return {"outcome": float(message.content.strip() == question.answer)}

        return lambda: ToolEnv(question.text, self._tools, reward, system=SYSTEM, max_messages=self._max_messages)

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        """A question answered by searching each of its entities and reading on until the fact is found."""
        question = self._draw(rng, held_out=False)
        messages = list(opening(question.text, self._tools, SYSTEM))
        facts = []
        for entity, relation in zip(question.entities, question.relations, strict=True):
            looked = f"I look for {entity.name}."
            messages += _say(looked, "search", {"query": entity.name}, search_text(self.index, entity.name))
            facts.append(sentence(entity, relation))
            messages += self._read(entity.id, facts[-1])
        return (*messages, Message("assistant", question.answer, " ".join(facts)))

    def _read(self, id: str, fact: str) -> list[Message]:
        messages, page, result = list[Message](), 0, ""
        while fact not in result:
            page += 1
            thought = "I open the page." if page == 1 else "I read on."
            arguments = {"id": id} if page == 1 else {"id": id, "page": page}
            result = page_text(self.index, id, page)
            messages += _say(thought, "open", arguments, result)
        return messages

    def _draw(self, rng: random.Random, *, held_out: bool) -> Question:
        while True:
            question = self._ask(self.world, rng)
            if is_held_out(question.text) == held_out:
                return question


SYSTEM = "Answer with nothing but the name or number that was asked for."


def _say(reasoning: str, name: str, arguments: Mapping[str, Any], result: str) -> tuple[Message, Message]:
    return Message("assistant", "", reasoning, (ToolCall(name, arguments),)), Message("tool", result)


def _build(documents: Sequence[Document]) -> bm25s.BM25:
    tokens = [words(f"{document.title} {document.text}") for document in documents]
    if not any(tokens):
        raise ValueError(f"no word in {len(documents)} documents; there is nothing to search")
    bm25 = bm25s.BM25()
    bm25.index(tokens, show_progress=False)
    return bm25


def _cached(documents: Sequence[Document], cache: Path) -> bm25s.BM25:
    """The index from its folder, or built and put there; a folder appears whole or not at all."""
    key = hashlib.sha256(f"{_FORMAT} {bm25s.__version__}".encode())
    for document in documents:
        for part in (document.id, document.title, document.text):
            key.update(f"{len(part)}:{part}".encode("utf-8", "surrogatepass"))
    folder = cache / key.hexdigest()[:32]
    if folder.is_dir():
        return bm25s.BM25.load(folder, show_progress=False)
    bm25 = _build(documents)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".") as temporary:
        built = Path(temporary) / "index"
        bm25.save(built, show_progress=False)
        try:
            built.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return bm25
