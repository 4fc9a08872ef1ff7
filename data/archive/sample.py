"""The embedded sample: about 2,000 invented citations in NLM's format, for machines without a network.

No text in it comes from PubMed. Its grammar is one that a small model can learn: terms recur within an abstract, verbs
agree in number, sections have labels. It also has what real files have: inline markup, other languages, records without
an abstract, a duplicate, revised PMIDs, second versions and a block of deletions.
"""

import gzip
import io
import random
from pathlib import Path
from xml.sax.saxutils import escape

from data.common.disk import disk_full_named
from data.common.files import UserError, make_output_folder, whole_file
from data.common.lease import hold

FIRST_PMID = 90_000_001
HEADER = (
    '<?xml version="1.0" encoding="utf-8"?>\n'
    '<!DOCTYPE PubmedArticleSet PUBLIC "-//NLM//DTD PubMedArticle, 1st January 2025//EN"'
    ' "https://dtd.nlm.nih.gov/ncbi/pubmed/out/pubmed_250101.dtd">\n<PubmedArticleSet>\n'
)
RECORD = """<PubmedArticle><MedlineCitation Status="MEDLINE" Owner="NLM"><PMID Version="{version}">{pmid}</PMID>
<Article PubModel="Print"><Journal><JournalIssue CitedMedium="Print"><PubDate><Year>{year}</Year></PubDate>
</JournalIssue><Title>{journal}</Title></Journal>
<ArticleTitle>{title}</ArticleTitle><Pagination><MedlinePgn>1-9</MedlinePgn></Pagination>
{abstract}<Language>{language}</Language>
<PublicationTypeList><PublicationType UI="D016428">Journal Article</PublicationType></PublicationTypeList>
{vernacular}</Article>
<MedlineJournalInfo><MedlineTA>{journal}</MedlineTA></MedlineJournalInfo></MedlineCitation>
<PubmedData><PublicationStatus>ppublish</PublicationStatus>
<ArticleIdList><ArticleId IdType="pubmed">{pmid}</ArticleId></ArticleIdList></PubmedData>
</PubmedArticle>
"""
JOURNALS = ("Annals of Invented Medicine", "Journal of Sample Oncology", "Imaginary Neurology", "Fictional Cardiology")
DRUG_ROOTS = ("vel", "tor", "mira", "zano", "pelu", "cabo", "neri", "solu", "dara", "fexi", "bromi", "kali", "lixo")
DRUG_ENDINGS = ("tinib", "mab", "statin", "pril", "zole", "cillin", "olol", "gliptin")
DISEASES = (
    "chronic ferranitis", "acute melgic fever", "type 2 dravonosis", "pulmonary sarcolithia", "juvenile corvalgia",
    "non-small-cell verroma", "post-viral tremulosis", "hereditary bradyphrenia", "diffuse nodal arcitis",
)  # fmt: skip
GENES = ("BRV1", "TNK4", "p-Akt2", "IL-31b", "CDX9", "miR-907", "HOX-D7", "SLC99A1")
TISSUES = ("liver", "lung", "cardiac muscle", "cortical neurons", "bone marrow", "kidney", "plasma")
GROUPS = (("patient", "patients"), ("mouse", "mice"), ("volunteer", "volunteers"), ("infant", "infants"))
MEASURES = ("survival", "blood pressure", "viral load", "pain score", "tumour volume", "bone density")
LANGUAGES = {
    "fre": "Étude de {drug} chez l'homme",
    "ger": "Über die Wirkung von {drug} bei {count} Kranken",
    "spa": "Evaluación de {drug} en niños",
    "rus": "Влияние препарата {drug}",
    "jpn": "{drug}の効果",
}


def write_sample(folder: Path, citations: int = 2_000, seed: int = 1) -> list[Path]:
    """Write a baseline file and an update file of invented citations. Returns their paths.

    The same arguments always give the same bytes. Raises UserError if the folder cannot be written, holds
    other files of these names, or is being written by another command.
    """
    rng = random.Random(seed)
    records = [_record(rng, FIRST_PMID + index) for index in range(citations)]
    records[-1] = records[0].replace(str(FIRST_PMID), str(FIRST_PMID + citations - 1))  # one exact duplicate
    revised = [_record(rng, FIRST_PMID + index) for index in rng.sample(range(citations), 10)]
    second = [_record(rng, FIRST_PMID + index, version=2) for index in rng.sample(range(citations), 5)]
    deleted = [FIRST_PMID + index for index in rng.sample(range(citations), 10)]
    deletions = "".join(f'<PMID Version="1">{pmid}</PMID>\n' for pmid in deleted)
    baseline = HEADER + "".join(records) + "</PubmedArticleSet>\n"
    update = f"{HEADER}{''.join(revised + second)}<DeleteCitation>\n{deletions}</DeleteCitation>\n</PubmedArticleSet>\n"
    paths = [folder / "pubmed26n0001.xml.gz", folder / "pubmed26n0002.xml.gz"]
    with disk_full_named(folder, str(folder)), hold(folder):
        make_output_folder(folder)
        contents = [_zipped(text) for text in (baseline, update)]
        for path, content in zip(paths, contents, strict=True):
            if path.exists() and (not path.is_file() or path.read_bytes() != content):
                raise UserError(f"{path}: is there already and is no sample; choose another --out")
        for path, content in zip(paths, contents, strict=True):
            with whole_file(path) as stream:
                stream.write(content)
    return paths


def _zipped(text: str) -> bytes:
    stream = io.BytesIO()
    with gzip.GzipFile("", "wb", 6, stream, mtime=0) as zipped:
        zipped.write(text.encode())
    return stream.getvalue()


def _record(rng: random.Random, pmid: int, version: int = 1) -> str:
    drug = (rng.choice(DRUG_ROOTS) + rng.choice(DRUG_ENDINGS)).capitalize()
    disease, gene, tissue = rng.choice(DISEASES), rng.choice(GENES), rng.choice(TISSUES)
    singular, plural = rng.choice(GROUPS)
    measure = rng.choice(MEASURES)
    count, dose, year = rng.randint(12, 480), rng.choice((5, 10, 25, 50, 100)), rng.randint(1975, 2025)
    title = rng.choice(
        (
            f"Effect of {drug} on {measure} in {plural} with {disease}.",
            f"{drug} reduces {gene} expression in {tissue}: a study of {count} {plural}.",
            f"Is {gene} a marker of {disease}? Evidence from {tissue}.",
        )
    )
    sections = {
        "BACKGROUND": f"{disease.capitalize()} affects {measure} and the {tissue}. The role of {gene} in {disease} is"
        f" not known, and {drug} has not been studied in {plural}.",
        "METHODS": f"We studied {count} {plural} with {disease}. Each {singular} was given {drug}"
        f" ({dose} mg/kg, twice daily) or placebo, and {gene} was measured in the {tissue} by PCR.",
        "RESULTS": _results(rng, drug, gene, tissue, measure, singular, plural, count),
        "CONCLUSIONS": f"{drug} {rng.choice(('improves', 'does not improve', 'may improve'))} {measure} in {plural}"
        f" with {disease}; {gene} {rng.choice(('is', 'is not'))} a useful marker.",
    }
    language = rng.choice(tuple(LANGUAGES)) if rng.random() < 0.08 else "eng"
    vernacular = ""
    if language != "eng":
        vernacular = f"<VernacularTitle>{LANGUAGES[language].format(drug=drug, count=count)}</VernacularTitle>"
        title = f"[{title.rstrip('.')}]."
    return RECORD.format(
        pmid=pmid,
        version=version,
        year=year,
        journal=rng.choice(JOURNALS),
        title=_markup(escape(title), gene),
        abstract=_abstract(rng, sections, gene),
        language=language,
        vernacular=vernacular,
    )


def _results(
    rng: random.Random, drug: str, gene: str, tissue: str, measure: str, singular: str, plural: str, count: int
) -> str:
    responders, p_value = rng.randint(2, count - 2), rng.choice(("< 0.001", "= 0.03", "= 0.2", "> 0.05"))
    change = rng.choice(("higher", "lower", "no different"))
    verb = "were" if responders != 1 else "was"
    return (
        f"{responders} of {count} {plural} {verb} responders ({100 * responders / count:.1f}%). In these {plural},"
        f" {gene} levels were {change} than in the controls (P {p_value}), and {measure} was {change} after"
        f" {drug}. No {singular} died. {gene} in the {tissue} correlated with {measure} (r = 0.{rng.randint(11, 98)})."
    )


def _abstract(rng: random.Random, sections: dict[str, str], gene: str) -> str:
    if rng.random() < 0.04:
        return ""
    texts = {label: _markup(escape(text), gene) for label, text in sections.items()}
    if rng.random() < 0.5:
        return f"<Abstract><AbstractText>{' '.join(texts.values())}</AbstractText></Abstract>"
    labelled = "".join(
        f'<AbstractText Label="{label}" NlmCategory="{label}">{text}</AbstractText>\n' for label, text in texts.items()
    )
    return f"<Abstract>{labelled}</Abstract>"


def _markup(escaped: str, gene: str) -> str:
    """The text with inline markup as NLM writes it: genes in italics, superscripts."""
    return escaped.replace(gene, f"<i>{gene}</i>").replace("mg/kg", "mg kg<sup>-1</sup>")
