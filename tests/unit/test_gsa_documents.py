"""Documents of the sparse attention benchmark: our own, and anybody's."""

from __future__ import annotations

from pathlib import Path

import pytest

from ucm.bench.gsa_documents import SOURCES, check_document, own_document, read_documents
from ucm.bench.gsa_probes import make_passkeys
from ucm.errors import ConfigError


class Characters:
    """An encoder: a token a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


@pytest.mark.parametrize("name", SOURCES)
def test_our_own_are_long_and_always_the_same(name: str) -> None:
    document = own_document(name, Characters(), 100_000)
    assert document.name == name
    assert len(document.token_ids) == SOURCES[name].num_tokens
    assert own_document(name, Characters(), 100_000) == document
    assert len(SOURCES[name].make()) > 9_000
    assert own_document(name, Characters(), 50).token_ids == document.token_ids[:50]


def test_files_are_cut_and_told_apart(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "t.txt", tmp_path / "b" / "t.txt"
    for path, text in ((first, "größer " * 20), (second, "x" * 60)):
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
    found = read_documents([first, second], Characters(), 50, 100)
    assert [document.name for document in found] == ["t.txt", "t.txt (2)"]
    assert [len(document.token_ids) for document in found] == [100, 60]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x01\x02" * 100, "binary"),
        ("schön".encode("latin-1") * 100, "UTF-8"),
        (b"too short", "at least"),
        (b"", "at least"),
        (None, "No such file"),
    ],
)
def test_what_is_no_document(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "d.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_documents([path], Characters(), 50, 100)
    with pytest.raises(ConfigError, match="--document"):
        read_documents([tmp_path], Characters(), 50, 100)
    if message != "at least":
        with pytest.raises(ConfigError, match=message):
            check_document(path)


def test_pass_keys_are_hidden_at_every_depth() -> None:
    text = "One sentence. And one more. " * 200
    found = make_passkeys(text, Characters(), 2000, 5)
    places = []
    for passkey in found:
        prompt, answer = ("".join(map(chr, ids)) for ids in (passkey.prompt, passkey.answer))
        key = answer.strip()
        assert len(key) == 5
        assert key.isdigit()
        assert prompt.count(key) == 2
        assert prompt.endswith("The pass key is")
        assert len(prompt) < 2350
        places.append(prompt.index(key) / len(prompt))
    assert places == sorted(places)
    assert places[0] < 0.1
    assert places[-1] > 0.85
    assert len({passkey.answer for passkey in found}) == 5
