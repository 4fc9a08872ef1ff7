"""sacremoses' rules as (expression, replacement), where the expression is a regular expression of Oniguruma.

Rust's `tokenizers` uses Oniguruma. The rules stand in sacremoses' order and use its own sets of characters and its list
of abbreviations.

Each rule is rewritten so that every token keeps its exact place in the text. Python's `re.sub` consumes the characters
that a rule matches left and right of what it changes. Here `\\K` consumes the left side, and UNCONSUMED keeps the
character right of the last match from becoming a left side. So overlapping matches give the same result.
"""

import re
from collections.abc import Iterable

from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer
from sacremoses.util import CJKChars

Rule = tuple[str, str]


def _ranges(characters: Iterable[str]) -> str:
    """A set of characters as ranges of code points, to be put inside a bracket expression."""
    codes, ranges = sorted({ord(character) for character in characters}), []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(rf"\x{{{first:x}}}-\x{{{last:x}}}" for first, last in ranges)


WHITE_SPACE = _ranges(filter(str.isspace, map(chr, range(2**16))))  # none lies above
NUMBER = _ranges(set(MosesTokenizer.IsN) - {"\n"})
LETTER = _ranges(MosesTokenizer.IsAlpha)
LETTER_OR_DIGIT = _ranges(MosesTokenizer.IsAlnum)
LETTER_OR_NUMBER = _ranges(set(MosesTokenizer.IsAlpha) | set(MosesTokenizer.IsN) - {"\n"})
LOWER = _ranges(MosesTokenizer.IsLower)
OTHER = rf"[^{LETTER_OR_DIGIT}{WHITE_SPACE}.'`,\-]"
UNCONSUMED = r"(?:\A|(?!\G))"  # the next character is not the one right of the last match
# In place of a space that the detokenizer drops: see detokenizer_rules. No token holds a control character.
JOINT, CLOSING = "\x01", "\x02"
STARTS, ENDS = rf"(?<![^ {JOINT}{CLOSING}])", rf"(?![^ {JOINT}{CLOSING}])"  # here a token starts, ends


def moses_rules() -> list[Rule]:
    """The rules of `MosesTokenizer.tokenize`, without its escapes."""
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
        # Meanwhile sacremoses writes a run of full stops as DOTDOTMULTI, so that word in a text becomes a run too.
        (r"(?<=DOT)MULTI", "|"),  # a "|" of the text is a token by now
        (r"DOT(?=(?:DOT)*\|)", "."),
        (r"(?<=\.)\|", ""),
    ]


def _final_full_stop() -> str:
    """Matches the full stop after a word that is not an abbreviation: sacremoses' `handles_nonbreaking_prefixes`."""
    moses = MosesTokenizer(lang="en")
    numeric = sorted(moses.NUMERIC_ONLY_PREFIXES)
    listed = "|".join(re.escape(prefix) for prefix in moses.NONBREAKING_PREFIXES if prefix.isalnum() and
                      prefix not in numeric)  # fmt: skip
    return (
        r"(?:\A|(?<= ))"
        rf"(?=(?>[^ ]+)(?<=[^ .]\.)(?! *[{LOWER}]))"  # one full stop ends the word, and no lower-case letter follows
        rf"(?!(?=[^ ]*\.[^ ])[^ ]*[{LETTER}])"  # as in "e.g."
        rf"(?!(?:{listed})\.(?: |\z))"
        rf"(?!(?:{'|'.join(numeric)})\. +[0-9])"
        r"[^ ]+\K\."
    )


def punctuation_rules() -> list[Rule]:
    """The rules of `MosesPunctNormalizer("en").normalize`.

    Tokens keep their offsets in the text, except where two characters become one or change places (quote and stop).
    """
    rewritten = {  # rules that keep a part of what they match
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
    rules: list[Rule] = MosesPunctNormalizer(lang="en").substitutions  # type: ignore[assignment]
    return [step for rule in rules for step in rewritten.get(rule[0], [rule])]


def detokenizer_rules() -> list[Rule]:
    """The rules of sacremoses' `MosesDetokenizer("en").detokenize`, for tokens joined by spaces.

    A space to be dropped first becomes JOINT, or CLOSING before a closing quote, so every rule still sees all tokens.
    The last rule drops them.
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


def _quote_rules(quote: str, opens: str) -> list[Rule]:
    """The rules for one kind of quote: of its tokens the first opens, the second closes, the third opens, and so on.

    quote: the expression of such a token; opens: a look-behind that holds where the token may open. A match begins
    where the last one ended, at a closing quote, goes past the next opening quote, and ends at the space before its
    closing quote.
    A token that neither opens nor closes is the apostrophe of "the Jones' house".
    """
    any_quote, opening = f"{STARTS}{quote}{ENDS}", f"{STARTS}{opens}{quote}{ENDS}"
    to_closing = rf"(?:(?!{opening}).)*{opening}(?:(?!{any_quote}).)*\K[ {JOINT}](?={any_quote})"
    return [
        (rf"(?:\A|\G(?!\A){quote}){to_closing}", CLOSING),
        (rf"(?<![^ {JOINT}]){opens}{quote}{ENDS}\K ", JOINT),
        *([(rf"(?<=s) (?={quote}{ENDS})", JOINT)] if opens else []),
    ]
