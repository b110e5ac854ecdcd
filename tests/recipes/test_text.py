"""Text that the Python installation has."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from recipes.text import (
    END_ID,
    MASK_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    corpus,
    docstrings,
    docstrings_of,
    encode,
    every_tenth,
    find_tokens,
)

SOURCE = '''
class Parser(Base):
    """Reads what is written."""

    async def read(self, path: str, *names, limit=3):
        r"""Read one file.

        And more.
        """

    def undocumented(self):
        return """no docstring"""
'''


def test_docstrings_are_found_with_what_they_belong_to() -> None:
    parser, read = docstrings_of(Path("email/parser/__init__.py"), SOURCE)
    assert (parser.signature, parser.text) == ("Parser", "Reads what is written.")
    assert (read.package, read.module) == ("email", "email.parser")
    assert (read.signature, read.text) == ("read(path, *names, limit)", "Read one file.\n\nAnd more.")
    assert read.summary == "Read one file."


def test_the_library_has_enough_of_them() -> None:
    texts = [docstring.text for docstring in docstrings()]
    assert len(texts) > 2_000 and len(set(texts)) == len(texts)


def test_own_files_come_instead_of_the_documentation(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("word " * 21_000)
    text, held_out = corpus([tmp_path / "own.txt"])
    assert [len(piece) for piece in text] == [10_000] * 9 + [5_000] and [len(piece) for piece in held_out] == [10_000]


def test_a_docstring_that_is_held_out_is_held_out_of_the_text_too() -> None:
    text, held_out = corpus()
    _, unseen = every_tenth(docstrings())
    assert {docstring.text for docstring in unseen} <= set(held_out)
    assert set(text).isdisjoint(held_out)


def test_a_tenth_is_held_out() -> None:
    kept, held_out = every_tenth(range(20))
    assert held_out == [9, 19] and sorted(kept + held_out) == list(range(20))


def test_every_text_has_tokens_that_give_it_back() -> None:
    tokenizer = find_tokens(["the cat and the dog"] * 3, 300)
    text = "the cats, ναί\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.encode(token).ids for token in SPECIAL_TOKENS] == [[END_ID], [PAD_ID], [MASK_ID]]
    assert encode(tokenizer, ["the", "dog"]).tolist().count(END_ID) == 2
