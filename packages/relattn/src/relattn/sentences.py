"""Where sentences begin and end: a rule-based splitter, which needs no model and no download."""

import re

# Titles and words that are cut short, which a full stop follows without ending the sentence.
_ABBREVIATIONS = frozenset(
    """
    mr mrs ms dr prof rev gen sen rep gov capt lt col sgt hon st messrs jr sr inc ltd co corp bros dept
    univ est approx vs etc e.g i.e cf al fig figs eq eqs sec secs ch vol vols no nos pp p ed eds tab app
    ref refs jan feb mar apr jun jul aug sept sep oct nov dec u.s u.k u.n a.m p.m ph.d m.d b.a m.a d.c
    resp ca viz
    """.split()  # noqa: SIM905
)
# Those that also end sentences: a capital letter behind them decides.
_MAY_END = frozenset(
    """
    jr sr inc ltd co corp bros etc al u.s u.k u.n a.m p.m ph.d m.d b.a m.a d.c est
    """.split()  # noqa: SIM905
)
# Words that begin sentences and are no names: a capital one behind such an abbreviation shows that it ended
# one.
_STARTERS = frozenset(
    """
    the a an in on at for from but and or so yet he she it we they i you this that these those there
    when while if as after before although however since with by his her its our their most many some
    all no not how what who why where which
    """.split()  # noqa: SIM905
)
_CLOSERS = "\"'”’»)]"
_END = re.compile(rf"[.!?…。！？]+[{re.escape(_CLOSERS)}]*(?=\s|$)|\n\s*\n|(?<=[。！？])")  # noqa: RUF001
_OPENERS = "\"'“‘«([¿¡"  # noqa: RUF001


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Begin and end of each sentence, in characters, in order, without the white space between them.

    A sentence ends at . ! ? or an ellipsis before white space, and at an empty line. It does not end behind
    an abbreviation, an initial ("J. Smith"), or where a small letter goes on. Every character that is not
    white space lies in exactly one sentence.

    >>> text = "Dr. Smith paid 3.5 million. Why? No one knows."
    >>> [text[begin:end] for begin, end in sentence_spans(text)]
    ['Dr. Smith paid 3.5 million.', 'Why?', 'No one knows.']
    """
    cuts = [match.end() for match in _END.finditer(text) if _ends_here(text, match)]
    spans = []
    begin = 0
    for end in [*cuts, len(text)]:
        piece = text[begin:end]
        stripped = piece.strip()
        if stripped:
            start = begin + piece.index(stripped[0])
            spans.append((start, start + len(stripped)))
        begin = end
    return spans


def sentences(text: str) -> list[str]:
    """The sentences of a text.

    >>> sentences("It rained. The U.S. team won!")
    ['It rained.', 'The U.S. team won!']
    """
    return [text[begin:end] for begin, end in sentence_spans(text)]


def _ends_here(text: str, match: re.Match[str]) -> bool:
    mark = match.group()
    if not mark.strip() or mark[0] in "。！？":  # noqa: RUF001
        return True
    following = text[match.end() :].lstrip()
    after = following.lstrip(_OPENERS)[:1]
    if not following:
        return True
    if after.islower():  # "he asked. and" is rare, "No! she said" and "approx. five" are not
        return False
    if not mark.startswith(".") or mark.startswith(".."):
        return True
    word = re.search(r"(\S*)$", text[: match.start()])
    before = word.group(1).lstrip(_OPENERS) if word else ""
    if re.fullmatch(r"[^\W\d_]", before) and before != "I":
        return False  # an initial
    lowered = before.lower()
    if lowered in ("no", "nos", "fig", "figs", "p", "pp", "eq", "eqs", "sec", "vol", "ch"):
        return not after.isdigit()  # "no. 5", but "He said no. Then"
    if lowered in _MAY_END or re.fullmatch(r"(?:[a-z]\.)+[a-z]", lowered):
        next_word = re.match(r"\w+", following.lstrip(_OPENERS))
        return next_word is not None and next_word.group().lower() in _STARTERS
    return lowered not in _ABBREVIATIONS
