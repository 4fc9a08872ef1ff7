"""`tokenizer.json`: Moses, BPE and the vocabulary as one pipeline of Rust's `tokenizers`.

Its ids equal those of the slow path, `data.text.tokenizer` and transformers' BioGptTokenizer.
"""

from string import ascii_lowercase

from sacremoses import MosesTokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from data.text.bpe import END_OF_WORD, Merge, Segmenter
from data.text.ids import SPECIAL_TOKENS
from data.text.moses_rules import LETTER, detokenizer_rules, moses_rules, punctuation_rules

NO_CHARACTER = "\U0010ffff"  # not assigned by Unicode, so no vocabulary holds it, except on purpose


def make_fast_tokenizer(vocabulary: dict[str, int], merges: list[Merge], normalize_punctuation: bool) -> Tokenizer:
    """The pipeline text -> `</s>` and ids, with the ids of transformers' slow BioGptTokenizer.

    `tokenizers` requires every part and product of a merge in its vocabulary. Those that are missing (17 of BioGPT's)
    get ids after the last one, and rules turn what would become them into `<unk>`.
    """
    tokens = dict.fromkeys(token for first, second in merges for token in (first, second, first + second))
    missing = [token for token in tokens if token not in vocabulary]
    whole = vocabulary | {token: len(vocabulary) + index for index, token in enumerate(missing)}
    fast = Tokenizer(models.BPE(whole, merges, unk_token="<unk>", end_of_word_suffix=END_OF_WORD, fuse_unk=False))
    fast.normalizer = _normalizer(normalize_punctuation, _unknown_token_rules(merges, missing))  # type: ignore
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    start = ("</s>", vocabulary["</s>"])
    fast.post_processor = processors.TemplateProcessing("</s> $A", "</s> $A </s> $B:1", [start])  # type: ignore
    joins = [decoders.Replace(Regex(expression), replacement) for expression, replacement in detokenizer_rules()]
    fast.decoder = decoders.Sequence([decoders.BPEDecoder(END_OF_WORD), decoders.Fuse(), *joins])  # type: ignore
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return fast


def _normalizer(normalize_punctuation: bool, unknown: list[str]) -> normalizers.Normalizer:
    """The steps from text to Moses tokens, escaped and joined by spaces.

    unknown: expressions of what becomes NO_CHARACTER, which has no id and so becomes `<unk>`.
    """
    rules = [*(punctuation_rules() if normalize_punctuation else []), *moses_rules()]
    steps = [normalizers.Replace(Regex(expression), replacement) for expression, replacement in rules]
    for expression, replacement in MosesTokenizer.MOSES_ESCAPE_XML_REGEXES:
        steps.append(normalizers.Replace(expression.pattern.removeprefix("\\"), replacement))
    steps += [normalizers.Replace(Regex(expression), NO_CHARACTER) for expression in unknown]
    return normalizers.Sequence(steps)


def _unknown_token_rules(merges: list[Merge], missing: list[str]) -> list[str]:
    """Expressions that match what would become a token that the vocabulary lacks: the slow tokenizer gives `<unk>`.

    BioGPT lacks one such token, "evertheless"; BioGPT-Large lacks "teworthy", "gorously" and "transist". They are parts
    of longer tokens ("nevertheless", "transistors"). An expression does not match where the letters before or after
    turn the part into a known token. It looks at no more than two letters before, and only for the rest of a known
    token after. So a rare word ("andnevertheless", "transistory") may get one `<unk>` too many. No id is ever beyond
    the vocabulary.
    """
    segment, rules = Segmenter(merges), []
    short = sorted({token for merge in merges for token in merge if token.isalpha() and len(token) <= 2})
    for token in missing:
        letters = token.removesuffix(END_OF_WORD)
        if not letters.isalpha():  # a part of Moses' escapes, which always come out whole
            continue
        if letters != token and segment(letters) == [token]:
            saved_by = [each for each in short if token not in segment(each + letters)]
            rules.append(_unknown_at_the_end(letters, saved_by))
        elif letters == token and any(token in segment(token + letter) for letter in ascii_lowercase):
            rest = [second.replace(END_OF_WORD, "(?![^ ])") for first, second in merges if first == token]
            rules.append(f"{token}(?=[^ ])(?!{'|'.join(rest) or '(?!)'})")
    return rules


def _unknown_at_the_end(letters: str, saved_by: list[str]) -> str:
    """Matches `letters` at the end of a word.

    saved_by: tokens of one or two letters. There is no match in a word that is one of them followed by `letters`.
    """
    groups = ["|".join(each for each in saved_by if len(each) == length) for length in (1, 2)]
    not_saved = [f"(?:(?<!{group})|(?<=[{LETTER}](?:{group})))" for group in groups if group]
    return f"{''.join(not_saved)}{letters}(?![^ ])"
