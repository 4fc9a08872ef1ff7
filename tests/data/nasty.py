"""Generated texts of all that Moses, BPE and the special tokens could stumble over."""

from hypothesis import strategies as st

nasty = st.lists(
    st.one_of(
        st.sampled_from([
            "'", "''", "' '", "'\n'", " '", "' ", ".'", ",'", "'s", "'t", "n't", "`", ".", "..", "...", "e.g.", "U.S.",
            "No.", "Fig. 3", "1,000", ",", ",,", " ,5", "5, ", "-", "--", "@-@", "@@", "@", "@/@", "&amp;", "&lt;",
            "&amp;lt;", "&apos;", "&#91;", "&", "<", ">", "<s", "</w>", "s>", "|", "[", "]", "</ s>", "<PAD>", "α",
            "β-catenin", "中文", "日本語。", "한국어", "é", "e\u0301", "\u0301", "\u200b", "\u200d", "\ufeff", "\u00ad",
            "\x00", "\x07", "\x1f", "\x7f", "\x85", "\u00a0", "\u2009", "\u2028", "\u3000", "\u180e", "\ue000", "😀",
            "👩‍🔬", "ﬁ", "ß", "İ", "ǆ", "𝛼", "\U0010ffff", " ", "  ", "\n", "\t", "\r\n", "the", "The", "patients",
            "p53", "COVID-19", "mg/kg", "10%", "madeupword0000", "DOTMULTI", "DOTDOTMULTI",
        ]),
        st.text(max_size=6),
        st.text(st.characters(max_codepoint=0x24F), max_size=8),
    ),
    max_size=25,
).map("".join)  # fmt: skip
