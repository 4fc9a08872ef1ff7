"""The section `[corpus]`: the keys of filters and cleaning rules, profiles that set several of them, and reading it."""

from pathlib import Path
from typing import Any, Literal

from data.common.files import UserError, sha256
from data.common.settings import Section, override, read_toml, validate
from data.corpus.cleaning import CleaningSettings, cleaning_switches
from data.corpus.filters import RETRACTED, FilterSettings, filter_versions


class CorpusSection(FilterSettings, CleaningSettings):
    """`[corpus]`: the settings of `biogpt corpus`. The defaults are the profile `clean`."""

    profile: Literal["clean", "biogpt"] = "clean"
    """biogpt: the text that the model of 2022 saw, as far as is known. Keys that you set win over the profile's."""
    unicode_scripts: bool = False
    """Write superscripts and subscripts in Unicode's characters where it has them: 10⁻³, m², CO₂ instead of 10-3, m2,
    CO2. Off, because hardly any text of today reads so: see `data.archive.medline.flatten`."""
    text_column: str = "text"
    """The column that holds the text in files that are not PubMed's."""
    drop_duplicates: bool = True
    """Keep one of several texts that differ only in case, white space, compatibility forms or ASCII punctuation."""
    drop_near_duplicates: bool = False
    """Keep one of several texts that share most runs of five words (Jaccard similarity of 0.7 and more)."""


CLEAN = CorpusSection()
PROFILES: dict[str, dict[str, Any]] = {
    "clean": {},
    # PubMed before 2021. BioGPT kept what the cleaning rules drop, but no character of category C occurs in its data.
    "biogpt": {
        "last_year": 2020,
        "drop_withdrawn": False,
        "drop_publication_types": (),
        "drop_duplicates": False,
        "unescape_entities": False,
        "drop_filler_labels": False,
        "drop_truncation_marks": False,
        "drop_copyright_tails": False,
        "drop_publisher_notes": False,
        "drop_placeholders": False,
    },
}
# Manifests have always recorded these keys, in this order. Keep it: a corpus made again must have the same bytes. The
# cleaning rules follow, then later keys, which are recorded only where they do something.
FIRST_IN_MANIFESTS = (
    "profile",
    "title_and_abstract",
    "languages",
    "first_year",
    "last_year",
    "minimum_words",
    "drop_retracted",
    "text_column",
    "exclude_pmids",
    "drop_duplicates",
    "drop_near_duplicates",
)


def load_corpus_settings(path: Path | None, overrides: list[str] | tuple[str, ...] = ()) -> CorpusSection:
    """The settings in the section [corpus] of a TOML file; None: the defaults.

    overrides: `corpus.key=value`, which win over the file, as the file wins over the profile. Raises UserError, which
    names the missing file or every wrong key.
    """
    source = str(path or "biogpt corpus")
    try:
        settings = read_toml(path) if path else {}
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file of settings") from None
    override(settings, overrides, source)
    given = validate(_Root, settings, source).corpus
    return validate(CorpusSection, PROFILES[given.profile] | given.model_dump(exclude_unset=True), source)


class _Root(Section):
    corpus: CorpusSection = CorpusSection()


def recorded_settings(settings: CorpusSection) -> dict[str, Any]:
    """The settings as the manifest of a finished corpus records them; JSON.

    Rules and filters in use are recorded with their versions, and the file `exclude_pmids` by its sha256. So a corpus
    made with an older rule, filter or list of PMIDs is not taken for the one that is asked for. A key that was added
    since and is false, 0 or empty is left out, so a corpus made before the key existed stays valid. For the same reason
    `drop_publication_types` is left out where `drop_retracted`, the key of that time, says all.
    """
    values = settings.model_dump(mode="json")
    if settings.exclude_pmids:
        values["exclude_pmids"] = sha256(Path(settings.exclude_pmids))
    values["drop_retracted"] = RETRACTED in settings.drop_publication_types
    if settings.drop_publication_types == (RETRACTED,):
        del values["drop_publication_types"]
    recorded = {key: values[key] for key in FIRST_IN_MANIFESTS} | cleaning_switches(settings)
    recorded |= {key: value for key, value in values.items() if value and key not in recorded}
    if versions := filter_versions(settings):
        recorded["filter_versions"] = versions
    return recorded
