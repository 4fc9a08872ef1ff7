"""data/corpus/settings.py: profiles, what is put over them, mistakes, and what a manifest records."""

import re
from pathlib import Path

import pytest

from data.common.files import UserError
from data.corpus.cleaning import cleaning_switches
from data.corpus.settings import CLEAN, load_corpus_settings


def test_profiles_and_what_is_put_over_them(tmp_path: Path) -> None:
    assert load_corpus_settings(None) == CLEAN and CLEAN.drop_retracted and CLEAN.last_year is None
    biogpt = load_corpus_settings(None, ["corpus.profile=biogpt"])
    assert {name for name, on in cleaning_switches(biogpt).items() if on} == {"drop_control_characters"}
    assert not biogpt.drop_duplicates and not biogpt.drop_retracted and biogpt.last_year == 2020
    path = tmp_path / "corpus.toml"
    path.write_text('[corpus]\nprofile = "biogpt"\nlanguages = ["eng"]\nminimum_words = 5\n')
    both = load_corpus_settings(path, ["corpus.minimum_words=7", "corpus.drop_duplicates=true"])
    assert load_corpus_settings(None, ["corpus.languages=eng,ger"]).languages == ("eng", "ger")
    assert (both.languages, both.minimum_words, both.drop_duplicates, both.last_year) == (("eng",), 7, True, 2020)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("corpus.minimum_word=3", "unknown key corpus.minimum_word; did you mean corpus.minimum_words?"),
        ("corpus.minimum_words=-3", "corpus.minimum_words = -3"),
        ("corpus.profile=dirty", "corpus.profile = 'dirty'"),
        ("corpora.languages=eng", "unknown key corpora; did you mean corpus?"),
        ("corpus.languages", "not of the form section.key=value"),
    ],
)
def test_mistakes_in_settings_are_named(given: str, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        load_corpus_settings(None, [given])
