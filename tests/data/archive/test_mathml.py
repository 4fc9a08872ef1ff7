"""data/archive/mathml.py: formulas as people write them in a line, and every element of NLM's DTD."""

import re

import pytest
from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

from data.archive import mathml
from data.archive.mathml import linear, unicode_script
from data.archive.medline import Citation, read_medline
from tests.shared import NLM, needs_shared


def text_of(inner: str, unicode_scripts: bool = False) -> str:
    return linear(etree.fromstring(f'<math xmlns="http://www.w3.org/1998/Math/MathML">{inner}</math>'), unicode_scripts)


ONE, TWO, N = "<mn>1</mn>", "<mn>2</mn>", "<mi>n</mi>"


@pytest.mark.parametrize(
    ("xml", "text", "in_unicode"),
    [
        (f"<mfrac>{ONE}{TWO}</mfrac>", "1/2", "1/2"),
        (f"<mfrac><mrow><mi>a</mi><mo>+</mo>{ONE}</mrow>{TWO}</mfrac>", "(a+1)/2", "(a+1)/2"),
        (f"<mfrac>\n <mrow>\n  {ONE}\n </mrow>\n {TWO}\n</mfrac>", "1/2", "1/2"),
        ("<msqrt><mi>s</mi></msqrt>", "sqrt(s)", "sqrt(s)"),
        (f"<msqrt><mi>a</mi><mo>+</mo>{ONE}</msqrt>", "sqrt(a+1)", "sqrt(a+1)"),
        ("<mroot><mi>s</mi><mn>3</mn></mroot>", "root(3, s)", "root(3, s)"),
        (f"<msub><mtext>Cu</mtext>{TWO}</msub><mi>O</mi>", "Cu2O", "Cu₂O"),
        (f"<msup><mi>x</mi>{TWO}</msup>", "x2", "x²"),
        (f"<msubsup><mi>x</mi>{ONE}{TWO}</msubsup>", "x12", "x₁²"),
        ("<msub><mi>V</mi><mi>max</mi></msub>", "Vmax", "Vmax"),
        (f"<mmultiscripts><mi>He</mi><mprescripts/><none/>{'<mn>3</mn>'}</mmultiscripts>", "3He", "³He"),
        (f"<mmultiscripts><mi>O</mi>{TWO}<none/><mprescripts/><none/><mn>18</mn></mmultiscripts>", "18O2", "¹⁸O₂"),
        ("<mover><mi>V</mi><mo>.</mo></mover>", "V.", "V."),
        (f"<munderover><mo>∑</mo>{ONE}{N}</munderover><mi>x</mi>", "∑1nx", "∑1nx"),
        ('<mfenced open="[" separators=";"><mi>a</mi><mi>b</mi></mfenced>', "[a;b)", "[a;b)"),
        (
            f"<mtable><mtr><mtd>{ONE}</mtd><mtd>{TWO}</mtd></mtr><mtr><mtd>{N}</mtd></mtr></mtable>",
            "1, 2; n",
            "1, 2; n",
        ),
        (f"<semantics><mrow>{ONE}</mrow><annotation encoding='TeX'>\\frac</annotation></semantics>", "1", "1"),
        (f"<mrow>{ONE}<mphantom>{TWO}</mphantom><mspace/></mrow>", "1", "1"),
        ("<apply><plus/><ci>a</ci><cn>1</cn></apply>", "a1", "a1"),
    ],
)
def test_formulas_in_a_line(xml: str, text: str, in_unicode: str) -> None:
    assert (text_of(xml), text_of(xml, unicode_scripts=True)) == (text, in_unicode)


def test_layout_is_dropped_and_other_spaces_are_text() -> None:
    assert text_of(f"\n {ONE}\n  <mtext> of </mtext>\n{TWO} ") == "1 of 2 "


@needs_shared
def test_every_presentation_element_of_nlms_dtd_is_listed() -> None:
    """The table in the module's docstring names each; those of content MathML are one row."""
    names = (NLM.parent / "dtd" / "mathml3-qname1.mod").read_text()
    elements = set(re.findall(r"%MATHML\.pfx;(m[a-z-]+|none|semantics|annotation[a-z-]*)", names))
    content = {"max", "mean", "median", "min", "minus", "mode", "moment", "momentabout", "matrix", "matrixrow"}
    listed = set(re.findall(r"[a-z-]+", (mathml.__doc__ or "").split("|---|---|")[1]))
    assert len(elements - content) >= 40 and elements - content <= listed


@needs_shared
def test_formulas_of_real_records() -> None:
    path = NLM / "assembled_3693.xml.gz"
    texts = [record.abstract for record in read_medline(path) if isinstance(record, Citation)]
    found = {formula: sum(formula in text for text in texts) for formula in ("3He/129Xe", "V.O2max", "(Cu2O)")}
    print(found)
    assert all(found.values())


def test_a_script_is_written_whole_or_not_at_all() -> None:
    assert [unicode_script("sup", text) for text in ("-1", "2+", "th", "1,2", "")] == ["⁻¹", "²⁺", "th", "1,2", ""]
    assert [unicode_script("sub", text) for text in ("50", "max", "n")] == ["₅₀", "max", "n"]
