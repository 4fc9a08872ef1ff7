"""Moses tokenization, exactly as `transformers.BioGptTokenizer` calls sacremoses."""

from functools import lru_cache

from sacremoses import MosesTokenizer


@lru_cache(maxsize=1)
def _moses() -> MosesTokenizer:
    return MosesTokenizer(lang="en")


def tokenize(text: str) -> list[str]:
    """The Moses tokens of a text: aggressive dash splits, escaped (`&`, `<`, `[` ... become `&amp;` ...).

    No token holds white space. Text that looks like a special token ("</s>") comes out as plain escaped pieces.
    """
    tokens = _moses().tokenize(text, aggressive_dash_splits=True, return_str=False, escape=True)
    assert isinstance(tokens, list)  # a string only with return_str
    return tokens
