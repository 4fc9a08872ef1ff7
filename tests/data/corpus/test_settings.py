"""data/corpus/settings.py: profiles, what is put over them, mistakes, and what a manifest records."""

import re
from pathlib import Path

import pytest

from data.common.files import UserError
from data.corpus.cleaning import cleaning_switches
from data.corpus.settings import CLEAN, load_corpus_settings, recorded_settings


def test_profiles_and_what_is_put_over_them(tmp_path: Path) -> None:
    assert load_corpus_settings(None) == CLEAN and CLEAN.drop_publication_types and CLEAN.last_year is None
    biogpt = load_corpus_settings(None, ["corpus.profile=biogpt"])
    assert {name for name, on in cleaning_switches(biogpt).items() if on} == {"drop_control_characters"}
    assert not biogpt.drop_duplicates and not biogpt.drop_publication_types and not biogpt.drop_withdrawn
    path = tmp_path / "corpus.toml"
    path.write_text('[corpus]\nprofile = "biogpt"\nlanguages = ["eng"]\nminimum_words = 5\n')
    assert biogpt.last_year == 2020
    both = load_corpus_settings(path, ["corpus.minimum_words=7", "corpus.drop_duplicates=true"])
    assert load_corpus_settings(None, ["corpus.languages=eng,ger"]).languages == ("eng", "ger")
    assert (both.languages, both.minimum_words, both.drop_duplicates, both.last_year) == (("eng",), 7, True, 2020)


RETRACTED, ERRATUM = "Retracted Publication", "Published Erratum"


@pytest.mark.parametrize(
    ("given", "types"),
    [
        ((), (RETRACTED, ERRATUM)),
        (("drop_publication_types=Letter|Research Support, U.S. Gov't, P.H.S.",),
         ("Letter", "Research Support, U.S. Gov't, P.H.S.")),
        (('drop_publication_types=[" News ", "Letter", "News"]',), ("News", "Letter")),
        (("drop_publication_types=",), ()),
        (("drop_publication_types=[]",), ()),
        (("drop_retracted=true",), (RETRACTED,)),
        (("drop_retracted=false",), ()),
        (("profile=biogpt", "drop_retracted=true"), (RETRACTED,)),
    ],
)  # fmt: skip
def test_publication_types_are_given_as_a_list_or_between_bars(given: tuple[str, ...], types: tuple[str, ...]) -> None:
    assert load_corpus_settings(None, [f"corpus.{each}" for each in given]).drop_publication_types == types


@pytest.mark.parametrize(
    ("types", "recorded"),
    [
        ("", {"drop_retracted": False}),
        (RETRACTED, {"drop_retracted": True}),
        (ERRATUM, {"drop_retracted": False, "drop_publication_types": [ERRATUM]}),
        (f"{RETRACTED}|{ERRATUM}", {"drop_retracted": True, "drop_publication_types": [RETRACTED, ERRATUM]}),
    ],
)
def test_types_are_recorded_as_before_where_that_says_all(types: str, recorded: dict[str, object]) -> None:
    """So a corpus made when there was only `drop_retracted` stays valid."""
    found = recorded_settings(load_corpus_settings(None, [f"corpus.drop_publication_types={types}"]))
    names = ("drop_retracted", "drop_publication_types")
    assert {name: found[name] for name in names if name in found} == recorded


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("corpus.minimum_word=3", "unknown key corpus.minimum_word; did you mean corpus.minimum_words?"),
        ("corpus.minimum_words=-3", "corpus.minimum_words = -3"),
        ("corpus.profile=dirty", "corpus.profile = 'dirty'"),
        ("corpus.drop_publication_types=3", "corpus.drop_publication_types = 3"),
        (f"corpus.drop_publication_types={[str(number) for number in range(201)]}", "should have at most 200 items"),
        ("corpora.languages=eng", "unknown key corpora; did you mean corpus?"),
        ("corpus.languages", "not of the form section.key=value"),
    ],
)
def test_mistakes_in_settings_are_named(given: str, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        load_corpus_settings(None, [given])
