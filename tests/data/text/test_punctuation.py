"""data/text/punctuation.py against sacremoses' normalizer."""

import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sacremoses import MosesPunctNormalizer

from data.text.punctuation import normalize
from tests.data.nasty import nasty
from tests.data.reference import texts_of
from tests.shared import SHARED, needs_shared

ABSTRACTS = SHARED / "data" / "abstracts"
FILES = sorted(path.name for path in ABSTRACTS.glob("*.jsonl.gz"))


quoted = st.lists(
    st.one_of(nasty, st.sampled_from("()[]%:;,.!?`'\"„“”–—´‘’‚…«»\xa0º \r")), min_size=1, max_size=30
).map("".join)  # fmt: skip


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(quoted, min_size=1, max_size=5))
def test_punctuation_is_normalised_as_sacremoses_does(texts: list[str]) -> None:
    assert normalize(pa.array(texts)).to_pylist() == [MosesPunctNormalizer("en").normalize(text) for text in texts]


@needs_shared
def test_punctuation_of_real_texts_is_normalised_as_sacremoses_does() -> None:
    normalizer, texts = (
        MosesPunctNormalizer("en"),
        [text for name in FILES for text in texts_of(ABSTRACTS / name)[:400]],
    )
    expected = [normalizer.normalize(text) for text in texts]
    differences = sum(
        ours != theirs for ours, theirs in zip(normalize(pa.array(texts)).to_pylist(), expected, strict=True)
    )
    changed = sum(text != other for text, other in zip(texts, expected, strict=True))
    print(f"{len(texts)} texts, {changed} of them changed, {differences} differences")
    assert differences == 0 and changed > 500
