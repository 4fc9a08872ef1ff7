"""`tokenizer.json`: Moses, BPE and the vocabulary as one pipeline of Rust's `tokenizers`, ids equal to the slow path's.

Each rule of sacremoses' `MosesTokenizer("en")` is a regular expression of Oniguruma, in sacremoses' order, from
sacremoses' own sets of characters and list of abbreviations. `re.sub` consumes what stands left and right of what it
changes: here `\\K` consumes the left side, and `(?!\\G)` keeps the character right of the last match from being a left
side. So overlapping matches come out the same, and every token keeps its exact place in the text.
"""

import re
from collections.abc import Iterable
from string import ascii_lowercase

from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer
from sacremoses.util import CJKChars
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from data.text.bpe import END_OF_WORD, Merge, Segmenter
from data.text.ids import SPECIAL_TOKENS

STRANGER = "\U0010ffff"  # no character: a vocabulary holds it by no accident


def _ranges(characters: Iterable[str]) -> str:
    """A set of characters as the inside of a bracket expression: code ranges."""
    codes, ranges = sorted({ord(character) for character in characters}), []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(rf"\x{{{first:x}}}-\x{{{last:x}}}" for first, last in ranges)


WHITE_SPACE = _ranges(filter(str.isspace, map(chr, range(2**16))))  # there is none above
NUMBER = _ranges(set(MosesTokenizer.IsN) - {"\n"})
LETTER = _ranges(MosesTokenizer.IsAlpha)
LETTER_OR_DIGIT = _ranges(MosesTokenizer.IsAlnum)
LETTER_OR_NUMBER = _ranges(set(MosesTokenizer.IsAlpha) | set(MosesTokenizer.IsN) - {"\n"})
LOWER = _ranges(MosesTokenizer.IsLower)
OTHER = rf"[^{LETTER_OR_DIGIT}{WHITE_SPACE}.'`,\-]"
UNCONSUMED = r"(?:\A|(?!\G))"
JOINT, CLOSING = "\x01", "\x02"  # no token holds a control character
STARTS, ENDS = rf"(?<![^ {JOINT}{CLOSING}])", rf"(?![^ {JOINT}{CLOSING}])"  # a token's two ends


def _final_full_stop() -> str:
    """The full stop of a word that is no abbreviation: sacremoses' `handles_nonbreaking_prefixes`."""
    moses = MosesTokenizer(lang="en")
    numeric = sorted(moses.NUMERIC_ONLY_PREFIXES)
    listed = "|".join(re.escape(prefix) for prefix in moses.NONBREAKING_PREFIXES if prefix.isalnum() and
                      prefix not in numeric)  # fmt: skip
    return (
        r"(?:\A|(?<= ))"
        rf"(?=(?>[^ ]+)(?<=[^ .]\.)(?! *[{LOWER}]))"  # one full stop ends the word; a capital, or nothing, follows
        rf"(?!(?=[^ ]*\.[^ ])[^ ]*[{LETTER}])"  # as in e.g.
        rf"(?!(?:{listed})\.(?: |\z))"
        rf"(?!(?:{'|'.join(numeric)})\. +[0-9])"
        r"[^ ]+\K\."
    )


def _moses_rules() -> list[tuple[str, str]]:
    """(expression, replacement) for all of `MosesTokenizer.tokenize` but its escapes."""
    return [
        (rf"[{WHITE_SPACE}]+", " "),
        (r"[\x00-\x1f]+", ""),
        (r"\A +| +\z", ""),
        (rf"(?={OTHER})|(?<={OTHER})", " "),
        (rf"-(?=[{LETTER_OR_DIGIT}])(?<=[{LETTER_OR_DIGIT}]-)", " @-@ "),
        (r"(?=\.\.)(?<!\.)", " "),
        (r"\.\.\K(?=[^.])", " "),
        (rf"[^{NUMBER}]\K,", " , "),
        (rf",(?=[^{NUMBER}])|(?<=[{NUMBER}]),\z", " , "),
        (rf"{UNCONSUMED}[^{LETTER}]\K'(?=[^{LETTER}])", " ' "),
        (rf"(?<=[^{LETTER_OR_NUMBER}])'(?=[{LETTER}])|(?<=[{LETTER}])'(?=[^{LETTER}])", " ' "),
        (rf"{UNCONSUMED}[{LETTER}]\K'(?=[{LETTER}])", " '"),
        (rf"(?<=[{NUMBER}])'(?=s)", " '"),
        (_final_full_stop(), " ."),
        (r"\.' *\z", " . ' "),
        # sacremoses writes runs of full stops as DOTDOTMULTI in between, and takes that in a text for one of its own.
        (r"(?<=DOT)MULTI", "|"),  # "|" stands apart by now
        (r"DOT(?=(?:DOT)*\|)", "."),
        (r"(?<=\.)\|", ""),
    ]


def _punctuation_rules() -> list[tuple[str, str]]:
    """(expression, replacement) for `MosesPunctNormalizer("en").normalize`.

    Offsets are those of the characters as they were, but where two become one or change places (a quote, a stop).
    """
    rewritten = {  # those that keep a part of what they match
        r"\) ([.!:?;,])": [(r"\)\K (?=[.!:?;,])", "")],
        r"(\d) %": [(r"\d\K %", "%")],
        "([a-zA-Z])‘([a-zA-Z])": [("‘", "'")],
        "([a-zA-Z])’([a-zA-Z])": [("’", "'")],
        r'"([,.]+)': [(r'"[,.]+\K', '"'), (r'"(?=[,.])', "")],
        "(\\d)\u00a0(\\d)": [(rf"{UNCONSUMED}\d\K\u00a0(?=\d)", ".")],
        r"\( ": [(r"\(\K ", "")],
        "nº\u00a0": [("nº\\K\u00a0", " ")],
        ",\u00a0": [(",\\K\u00a0", " ")],
        "\u00a0cm": [("\u00a0(?=cm)", " ")],
        "\u00a0ºC": [("\u00a0(?=ºC)", " ")],
    }
    rules: list[tuple[str, str]] = MosesPunctNormalizer(lang="en").substitutions  # type: ignore[assignment]
    return [step for rule in rules for step in rewritten.get(rule[0], [rule])]


def _detokenizer_rules() -> list[tuple[str, str]]:
    """(expression, replacement) for sacremoses' `MosesDetokenizer("en").detokenize`, of tokens with spaces between.

    A space that is to go becomes JOINT first (CLOSING before a closing quote), so that each rule sees all tokens.
    """
    punctuation, money = r",.?!:;\\%}\])", rf"{_ranges(MosesDetokenizer.IsSc)}(\[{{¿¡"
    letter, cjk = _ranges(MosesDetokenizer.IsAlpha), "".join(rf"\x{{{a:x}}}-\x{{{b:x}}}" for a, b in CJKChars().ranges)
    unescapes = [(plain.pattern, text) for plain, text in MosesDetokenizer.MOSES_UNESCAPE_XML_REGEXES]
    return [
        (r"\A| *\z", " "),
        (" @-@ ", "-"),
        *unescapes,
        (r"\A +| +\z", ""),
        (" +", " "),
        *_quote_rules('["„“]', ""),
        *_quote_rules("`", ""),
        *_quote_rules("``", ""),
        *_quote_rules("''", ""),
        *_quote_rules("'", "(?<!s )"),
        (rf"{STARTS}[{money}]+\K ", JOINT),
        (rf" (?=[{punctuation}]+{ENDS})", JOINT),
        (rf" (?='[{letter}])", JOINT),
        (rf"(?<=[{cjk}]) (?=[{cjk}])", JOINT),
        (f"[{JOINT}{CLOSING}]", ""),
    ]


def _quote_rules(quote: str, opens: str) -> list[tuple[str, str]]:
    """Of the tokens `quote` the first opens, the next closes, and so on; `opens` looks behind one that may open.

    A match begins where the last ended, at its closing quote, and goes over an opening one to the space before the
    next. One that neither opens nor closes is the apostrophe of "the Jones' house".
    """
    any_quote, opening = f"{STARTS}{quote}{ENDS}", f"{STARTS}{opens}{quote}{ENDS}"
    to_closing = rf"(?:(?!{opening}).)*{opening}(?:(?!{any_quote}).)*\K[ {JOINT}](?={any_quote})"
    return [
        (rf"(?:\A|\G(?!\A){quote}){to_closing}", CLOSING),
        (rf"(?<![^ {JOINT}]){opens}{quote}{ENDS}\K ", JOINT),
        *([(rf"(?<=s) (?={quote}{ENDS})", JOINT)] if opens else []),
    ]


def _unknown_pieces(merges: list[Merge], missing: list[str]) -> list[str]:
    """Expressions for what would come out as tokens that are missing: `<unk>` to the slow tokenizer.

    BioGPT has one, "evertheless"; BioGPT-Large has "teworthy", "gorously" and "transist". They are parts of longer
    tokens ("nevertheless", "transistors"): after what makes something else of them they stay, but not where another
    letter stands before that, nor before anything but the rest of such a token. There a word ("andnevertheless",
    "transistory") may have an `<unk>` too many; no id is ever beyond the vocabulary.
    """
    segment, expressions = Segmenter(merges), []
    short = sorted({piece for merge in merges for piece in merge if piece.isalpha() and len(piece) <= 2})
    for token in missing:
        word = token.removesuffix(END_OF_WORD)
        if not word.isalpha():  # pieces of Moses' escapes, which always come out whole
            continue
        if word != token and segment(word) == [token]:
            before = [piece for piece in short if token not in segment(piece + word)]
            groups = ["|".join(piece for piece in before if len(piece) == length) for length in (1, 2)]
            free = [f"(?:(?<!{group})|(?<=[{LETTER}](?:{group})))" for group in groups if group]
            expressions.append(f"{''.join(free)}{word}(?![^ ])")
        elif word == token and any(token in segment(token + letter) for letter in ascii_lowercase):
            rest = [second.replace(END_OF_WORD, "(?![^ ])") for first, second in merges if first == token]
            expressions.append(f"{token}(?=[^ ])(?!{'|'.join(rest) or '(?!)'})")
    return expressions


def make_fast_tokenizer(vocabulary: dict[str, int], merges: list[Merge], normalize_punctuation: bool) -> Tokenizer:
    """The pipeline text -> `</s>` and ids, as transformers' slow BioGptTokenizer gives them.

    The model of `tokenizers` wants every part and product of a merge in its vocabulary: those that are missing (17 of
    BioGPT's) get the ids after the last, and never come out.
    """
    parts = dict.fromkeys(token for first, second in merges for token in (first, second, first + second))
    missing = [token for token in parts if token not in vocabulary]
    whole = vocabulary | {token: len(vocabulary) + index for index, token in enumerate(missing)}
    rules = [*(_punctuation_rules() if normalize_punctuation else []), *_moses_rules()]
    steps = [normalizers.Replace(Regex(expression), replacement) for expression, replacement in rules]
    for expression, replacement in MosesTokenizer.MOSES_ESCAPE_XML_REGEXES:
        steps.append(normalizers.Replace(expression.pattern.removeprefix("\\"), replacement))
    steps += [normalizers.Replace(Regex(expression), STRANGER) for expression in _unknown_pieces(merges, missing)]
    fast = Tokenizer(models.BPE(whole, merges, unk_token="<unk>", end_of_word_suffix=END_OF_WORD, fuse_unk=False))
    fast.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    start = ("</s>", vocabulary["</s>"])
    fast.post_processor = processors.TemplateProcessing("</s> $A", "</s> $A </s> $B:1", [start])  # type: ignore
    joins = [decoders.Replace(Regex(expression), replacement) for expression, replacement in _detokenizer_rules()]
    fast.decoder = decoders.Sequence([decoders.BPEDecoder(END_OF_WORD), decoders.Fuse(), *joins])  # type: ignore
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return fast
