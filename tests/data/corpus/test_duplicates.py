"""data/corpus/duplicates.py: which texts count as equal, and which copy is kept."""

from pathlib import Path

from data.corpus.duplicates import comparison_key
from tests.data.citations import citation
from tests.data.corpora import build, splits, texts


def test_texts_that_count_as_equal() -> None:
    assert comparison_key("The ﬁrst  Title.") == comparison_key("the first title") == b"thefirsttitle"
    assert len({comparison_key(text) for text in ("IL-2", "IL2", "il 2.", "IL 2\n")}) == 1
    assert comparison_key("α-1") != comparison_key("β-1") and comparison_key("naïve") != comparison_key("naive")


def test_exact_duplicates_go_before_the_split(tmp_path: Path) -> None:
    """One copy of each text is left, whichever splits the copies' PMIDs would fall into: the lowest PMID's."""
    build(tmp_path, [[citation(pmid, f"Title {pmid % 10}.") for pmid in range(40, 0, -1)]], 0.3, 0.3)
    assert sorted(texts(tmp_path / "corpus")) == list(range(1, 11))
    assert len(set(splits(tmp_path / "corpus").values())) > 1


def test_duplicates_are_kept_where_the_switch_is_off(tmp_path: Path) -> None:
    records = [citation(1, "The IL-2 Receptor."), citation(2, "the IL2 receptor")]
    assert build(tmp_path / "a", [records])["counts"]["duplicates"] == 1
    assert set(texts(tmp_path / "a" / "corpus")) == {1}
    build(tmp_path / "b", [records], 0, 0, "corpus.drop_duplicates=false")
    assert set(texts(tmp_path / "b" / "corpus")) == {1, 2}
