"""Texts, facts and prompts of the benchmark of reuse at any position."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ucm.bench.gsa_documents import Document
from ucm.bench.rag_facts import RELATIONS, ask, asked, make_facts
from ucm.bench.rag_prompts import (
    CONT,
    COPY_TOKENS,
    SHAPES,
    PlainEncoder,
    Prompt,
    PromptMaker,
    PromptOptions,
    Shape,
)
from ucm.bench.rag_texts import SOURCES, check_folder, folder_texts, own_texts
from ucm.errors import ConfigError

BOS = 1


class Characters:
    """An encoder: a token a character, behind a first token that every text gets."""

    def encode(self, text: str) -> list[int]:
        return [BOS, *(ord(character) for character in text)]


def numbered(name: str, num_lines: int, start: int = 0) -> Document:
    """A text whose lines are numbered."""
    text = "".join(f"{name} line {start + i:05d}.\n" for i in range(num_lines))
    return Document(name, tuple(Characters().encode(text)[1:]))


def make(texts: list[Document], options: PromptOptions) -> tuple[list[Prompt], list[str]]:
    warnings: list[str] = []
    maker = PromptMaker(texts, Characters(), options, warnings.append)
    return maker.prompts(100_000), warnings


def words(tokens: tuple[int, ...]) -> str:
    return "".join(map(chr, tokens))


def test_our_own_texts_are_long_enough_for_every_shape() -> None:
    warnings: list[str] = []
    texts = own_texts(PlainEncoder(Characters()), warnings.append)
    assert [text.name for text in texts] == list(SOURCES)
    assert not warnings
    prompts, warned = make(texts, PromptOptions())
    assert not warned
    assert [prompt.kind for prompt in prompts] == [shape.kind for shape in SHAPES]
    assert {prompt.kind for prompt in prompts} == {"cont", "rag"}
    assert len({prompt.name for prompt in prompts}) == len(prompts) >= 8
    for prompt, shape in zip(prompts, SHAPES, strict=True):
        assert [len(chunk) for chunk in prompt.chunks] == [shape.chunk_tokens] * shape.num_chunks
        assert 3 <= shape.num_chunks <= 8
        assert 256 <= shape.chunk_tokens <= 512
        assert len(prompt.window) == 97
        assert len(prompt.passage) == COPY_TOKENS
        assert prompt.passage == prompt.chunks[shape.num_chunks // 2][:COPY_TOKENS]


def test_at_most_every_second_prompt_begins_with_the_sink_alone() -> None:
    prompts, _ = make([numbered("a", 2000)], PromptOptions(context_tokens=0))
    same = [prompt for prompt in prompts if prompt.prefix == prompt.sink]
    assert 0 < len(same) <= len(prompts) / 2
    assert all(prompt.prefix[0] == prompt.sink[0] == BOS for prompt in prompts)
    assert all(BOS not in chunk for prompt in prompts for chunk in prompt.chunks)
    assert any(prompt.prefix[: len(prompt.sink)] != prompt.sink for prompt in prompts)


def test_chunks_are_encoded_behind_text_that_no_prompt_has() -> None:
    texts = [numbered(name, 20 if name == "b" else 800) for name in "abcde"]
    prompts, _ = make(texts, PromptOptions())
    bare, _ = make(texts, PromptOptions(context_tokens=0))
    context = prompts[0].sink[len(bare[0].sink) :]
    assert prompts[0].sink[: len(bare[0].sink)] == bare[0].sink
    assert context == sum((texts[i].token_ids[-256:] for i in (0, 2, 3, 4)), ())
    kept = {line for line in words(context).splitlines() if line.endswith(".")}
    for prompt in prompts:
        assert prompt.sink == prompts[0].sink
        assert kept.isdisjoint(words(prompt.context + prompt.window).splitlines())


def test_of_short_texts_prompts_have_all() -> None:
    (prompt, *_), _ = make([numbered("a", 90)], PromptOptions())
    (bare, *_), _ = make([numbered("a", 90)], PromptOptions(context_tokens=0))
    assert prompt == bare


def test_a_text_goes_on_from_chunk_to_chunk_and_behind_them() -> None:
    prompts, _ = make([numbered("a", 2000)], PromptOptions(shapes=(Shape(CONT, 4, 300),)))
    (prompt,) = prompts
    facts = make_facts(4, 0)
    text = "".join(map(words, prompt.chunks))
    for fact in facts:
        assert text.count(fact.statement + "\n") == 1
        text = text.replace(fact.statement + "\n", "")
    whole = words(numbered("a", 2000).token_ids)
    assert whole.startswith(text + words(prompt.window))


def test_pieces_of_different_texts() -> None:
    texts = [numbered(name, 200) for name in "abcdef"]
    prompts, warned = make(texts, PromptOptions(shapes=(Shape("rag", 5, 300),) * 2))
    assert not warned
    for number, prompt in enumerate(prompts):
        names = [words(chunk)[0] for chunk in prompt.chunks]
        assert len(set(names)) == 5
        goes_on = names.index(prompt.name[-1])
        assert goes_on < 4
        facts = make_facts(5, number)
        piece = words(prompt.chunks[goes_on]).replace(facts[goes_on].statement + "\n", "")
        assert words(texts["abcdef".index(names[goes_on])].token_ids).startswith(
            piece + words(prompt.window)
        )


def test_places_of_one_text_where_there_is_no_other() -> None:
    prompts, warned = make([numbered("a", 400)], PromptOptions(shapes=(Shape("rag", 4, 300),)))
    assert not warned
    assert len(set(prompts[0].chunks)) == 4


def test_too_little_text() -> None:
    options = PromptOptions(
        shapes=(Shape(CONT, 8, 500), Shape("rag", 3, 256), Shape("rag", 8, 500))
    )
    prompts, warned = make([numbered("a", 66)], options)
    assert [(prompt.kind, len(prompt.chunks)) for prompt in prompts] == [("cont", 3)]
    assert len(warned) == 3
    assert "cont, 3 chunks of 256 tokens instead" in warned[0]
    assert all("too little text" in line for line in warned)
    with pytest.raises(ConfigError, match="the texts are too short"):
        make([numbered("a", 20)], options)


def test_prompts_longer_than_the_model_are_left_out() -> None:
    warnings: list[str] = []
    options = PromptOptions(shapes=(Shape(CONT, 8, 500), Shape(CONT, 3, 256)))
    maker = PromptMaker([numbered("a", 2000)], Characters(), options, warnings.append)
    prompts = maker.prompts(2048)
    assert [len(prompt.chunks) for prompt in prompts] == [3, 3]
    assert max(len(prompt.context) for prompt in prompts) < 2048
    with pytest.raises(ConfigError, match="positions"):
        maker.prompts(700)


@pytest.mark.parametrize("seed", range(2 * len(RELATIONS)))
def test_facts_say_the_same_of_different_places(seed: int) -> None:
    facts = make_facts(8, seed)
    assert facts == make_facts(8, seed)
    assert len({fact.question for fact in facts}) == 8
    assert all(fact.answer in fact.statement for fact in facts)
    question = ask(facts, 5, PlainEncoder(Characters()))
    text = words(question.token_ids)
    assert text.endswith(f"Question: {facts[5].question}\nAnswer:")
    assert words(question.gold) == f" {facts[5].answer}"
    assert text.count("Answer: ") == 2
    assert facts[5].question not in text[: text.rindex("Question")]


def test_questions_ask_for_different_chunks_but_the_first() -> None:
    for num_facts in range(3, 9):
        for num_questions in (1, 3, None):
            found = asked(num_facts, num_questions)
            wanted = num_facts - 1 if num_questions is None else num_questions
            assert len(set(found)) == len(found) == min(wanted, num_facts - 1)
            assert 0 not in found
            assert max(found) == num_facts - 1


def test_a_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "two.txt").write_text("zwei\n" * 300, encoding="utf-8")
    (tmp_path / "one.md").write_text("eins\n", encoding="utf-8")
    (tmp_path / ".hidden" / "three.txt").write_text("drei\n", encoding="utf-8")
    (tmp_path / "image.bin").write_bytes(b"\0\1\2")
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    warnings: list[str] = []
    check_folder(tmp_path)
    found = folder_texts(tmp_path, PlainEncoder(Characters()), warnings.append)
    assert [text.name for text in found] == [os.path.join("b", "two.txt"), "one.md"]
    assert words(found[1].token_ids) == "eins\n"
    assert [line.split(":")[0] for line in warnings] == ["left out"] * 3
    assert "binary" in "".join(warnings)
    assert "UTF-8" in "".join(warnings)


def test_a_folder_of_short_texts_is_read_as_fewer_longer_ones(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number:02}.txt").write_text(f"{number:02} " * 30)
    warnings: list[str] = []
    found = folder_texts(tmp_path, PlainEncoder(Characters()), warnings.append)
    assert [text.name for text in found] == [
        "00.txt to 45.txt",
        "46.txt to 91.txt",
        "92.txt to 99.txt",
    ]
    assert words(found[0].token_ids) == "".join(f"{number:02} " * 30 for number in range(46))
    assert warnings == ["all 100 files are short: neighbours are read as one text"]


def test_names_can_be_printed(tmp_path: Path) -> None:
    name = os.fsdecode(b"bad\xff\n.txt")
    (tmp_path / name).write_text("text\n" * 300)
    (found,) = folder_texts(tmp_path, PlainEncoder(Characters()), print)
    assert found.name.isprintable()
    assert found.name.encode("utf-8").startswith(b"bad")


def test_what_is_no_folder_of_texts(tmp_path: Path) -> None:
    nobody = lambda _line: None  # noqa: E731
    with pytest.raises(ConfigError, match=r"--documents .*no such folder"):
        check_folder(tmp_path / "none")
    with pytest.raises(ConfigError, match="no file in it"):
        check_folder(tmp_path)
    (tmp_path / "image.bin").write_bytes(b"\0\1\2")
    check_folder(tmp_path)
    with pytest.raises(ConfigError, match="no text in it"):
        folder_texts(tmp_path, Characters(), nobody)
    with pytest.raises(ConfigError, match="no such folder"):
        folder_texts(tmp_path / "image.bin", Characters(), nobody)


def test_a_package_without_its_licence_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ucm.bench.rag_texts._licence_files", lambda _package: iter(()))
    warnings: list[str] = []
    texts = own_texts(PlainEncoder(Characters()), warnings.append)
    assert [text.name for text in texts] == list(SOURCES)
    assert len(warnings) == 2
    assert all("installed without its licence" in line for line in warnings)
