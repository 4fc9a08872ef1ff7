"""MathML -> one line of text, as people write formulas in a line: "1/2", "sqrt(s)", "3He".

What becomes of each element of the MathML in NLM's DTD (mathml3.dtd):

| elements | text |
|---|---|
| math, mrow, mstyle, mpadded, merror, menclose, mtd | their contents, in order |
| mi, mn, mo, mtext, ms | their text |
| mfrac | "1/2"; a part of more than one word is put in parentheses: "(a+b)/2" |
| msqrt, mroot | "sqrt(s)"; "root(3, s)" |
| msub, msup, msubsup | base and scripts, as `<sub>` and `<sup>` are flattened: "Cu2", "x2" |
| munder, mover, munderover | base, then what stands below, then what stands above |
| mmultiscripts | the scripts before the base, the base, those after it: "3He" |
| mfenced | its contents with its fences and separators: "(a,b)" |
| mtable, mtr, mlabeledtr | rows separated by "; ", cells by ", " |
| semantics, maction | the first child: the formula itself, the selected form |
| annotation, annotation-xml, mphantom | nothing: they repeat the formula, or are not visible |
| mspace, mglyph, maligngroup, malignmark, mprescripts, none, msline | nothing, but for text that stands in them |
| mstack, mlongdiv, msgroup, msrow, mscarries, mscarry | their contents, in order |
| apply, ci, cn, csymbol and the other elements of content MathML | their contents, in order |

White space with a line break in it is layout. Other white space is text.
"""

import re
from collections.abc import Callable
from typing import Any

NAMESPACE = "{http://www.w3.org/1998/Math/MathML}"
SPACES = " \t\r\n"  # the white space of XML
SCRIPTS = {
    "sup": str.maketrans("0123456789+-−=()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿ"),
    "sub": str.maketrans("0123456789+-−=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎"),
}


def unicode_script(kind: str, text: str) -> str:
    """A superscript ("sup") or subscript ("sub") in Unicode's characters, or as it is if it has others too.

    Digits, signs and a superscript n are written so. Unicode's other small letters are phonetic signs, which nobody
    writes in "Vmax".
    """
    known = SCRIPTS[kind]
    return text.translate(known) if all(ord(character) in known for character in text) else text


def linear(element: Any, unicode_scripts: bool) -> str:
    """The text of a MathML element. unicode_scripts: write scripts in Unicode's characters, where it has them."""
    tag = element.tag.removeprefix(NAMESPACE)
    if tag in LEFT_OUT:
        return ""
    parts = [linear(child, unicode_scripts) + _text(child.tail) for child in element]
    write = WRITTEN.get(tag)
    return _text(element.text) + (write(element, parts, unicode_scripts) if write and parts else "".join(parts))


def _text(text: str | None) -> str:
    return "" if text is None or ("\n" in text and not text.strip(SPACES)) else text


def _fraction(_: Any, parts: list[str], __: bool) -> str:
    return "/".join(_grouped(part) for part in parts)


def _grouped(text: str) -> str:
    """The text, in parentheses if it is more than one number or name."""
    text = text.strip(SPACES)
    return text if re.fullmatch(r"[\w.,%°′'\u0300-\u036f]*|\([^()]*\)", text) else f"({text})"


def _square_root(_: Any, parts: list[str], __: bool) -> str:
    return f"sqrt({''.join(parts)})"


def _root(_: Any, parts: list[str], __: bool) -> str:
    return f"root({', '.join(reversed(parts))})"


def _scripts(*kinds: str) -> "Write":
    """Writes a base and scripts of these kinds."""

    def write(_: Any, parts: list[str], in_unicode: bool) -> str:
        kind_of = dict(enumerate(kinds, start=1))
        return "".join(_script(kind_of.get(index), part, in_unicode) for index, part in enumerate(parts))

    return write


def _script(kind: str | None, text: str, in_unicode: bool) -> str:
    return unicode_script(kind, text) if kind and in_unicode else text


def _multiscripts(element: Any, parts: list[str], in_unicode: bool) -> str:
    """The children are the base, pairs of sub- and superscripts, `mprescripts`, and pairs that stand before it."""
    tags = [child.tag.removeprefix(NAMESPACE) for child in element]
    middle = tags.index("mprescripts") if "mprescripts" in tags else len(tags)
    after, before = ([_script(("sub", "sup")[index % 2], part, in_unicode) for index, part in enumerate(each)]
                     for each in (parts[1:middle], parts[middle + 1 :]))  # fmt: skip
    return "".join([*before, parts[0], *after])


def _fenced(element: Any, parts: list[str], _: bool) -> str:
    separators = "".join(element.get("separators", ",").split())
    text = parts[0]
    for index, part in enumerate(parts[1:]):
        text += (separators[min(index, len(separators) - 1)] if separators else "") + part
    return element.get("open", "(") + text + element.get("close", ")")


def _rows(_: Any, parts: list[str], __: bool) -> str:
    return "; ".join(parts)


def _cells(_: Any, parts: list[str], __: bool) -> str:
    return ", ".join(parts)


def _first(_: Any, parts: list[str], __: bool) -> str:
    return parts[0]


Write = Callable[[Any, list[str], bool], str]
LEFT_OUT = frozenset({"annotation", "annotation-xml", "mphantom"})
WRITTEN: dict[str, Write] = {
    "mfrac": _fraction,
    "msqrt": _square_root,
    "mroot": _root,
    "msub": _scripts("sub"),
    "msup": _scripts("sup"),
    "msubsup": _scripts("sub", "sup"),
    "mmultiscripts": _multiscripts,
    "mfenced": _fenced,
    "mtable": _rows,
    "mtr": _cells,
    "mlabeledtr": _cells,
    "semantics": _first,
    "maction": _first,
}
