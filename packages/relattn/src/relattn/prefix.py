"""CA+Doc: the control in front of the document, whether or not the model was trained to read it there."""

from collections.abc import Sequence

from relattn.controls import Control, control_phrases
from shared_core import InputError

SEPARATOR = " => "
"""What stands between control and document; CTRLsum's models were trained with it."""


def with_prefix(
    documents: Sequence[str], controls: Sequence[Control], separator: str = SEPARATOR
) -> list[str]:
    """Each document behind its control's phrases.

    Args:
        documents: The sources.
        controls: One control a document. A blank one leaves its document as it is.
        separator: Between the two.

    Raises:
        InputError: There are not as many controls as documents.

    >>> with_prefix(["The band played."], [["jazz", "opera"]])
    ['jazz opera => The band played.']
    """
    if len(documents) != len(controls):
        raise InputError(f"expected {len(documents)}, one a document, got {len(controls)}", field="controls")
    joined = (" ".join(control_phrases(control)) for control in controls)
    return [
        f"{control}{separator}{document}" if control else document
        for control, document in zip(joined, documents, strict=True)
    ]
