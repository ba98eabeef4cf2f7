import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tools import record, report
from tools.record import Outcome, Status
from tools.tests.conftest import proof

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def outcome(package: str, status: Status = "holds", reason: str = "") -> Outcome:
    return Outcome(package, status, record.EXIT_CODES[status], 2.0, "2026-01-01 00:00 UTC", reason)


def page_of(runs: Path, content: object, status: Status = "holds") -> str:
    """The report of one package "one" whose proof.json holds ``content`` (text as it is, else as JSON)."""
    folder = runs / "one"
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "proof.json").write_text(text)
    return report.render(runs, [outcome("one", status)])


def words(html: str) -> str:
    """What a reader sees, with single spaces."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html.split("</style>")[-1]))


class _Balance(HTMLParser):
    VOID = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """A closed element such as <line/> opens nothing."""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "claim.png").write_bytes(PIXEL)
    html = page_of(tmp_path, proof("one", pictures=["claim.png"], notes=["a note"], command="one run --full"))
    balance = _Balance()
    balance.feed(html)
    assert balance.open == []
    assert "<script" not in html
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,|#)', html) == []


def test_numbers_show_mean_spread_and_paired_difference(tmp_path: Path) -> None:
    metrics = [
        {"name": "accuracy", "label": "top-1", "higher_is_better": True, "unit": "share", "fmt": ".2f"}
    ]
    text = words(page_of(tmp_path, proof("one", metrics=metrics)))
    assert "top-1, share higher is better" in text
    assert "one 0.85 [0.80 … 0.90]" in text
    assert "baseline 0.55 [0.50 … 0.60]" in text
    # By seed: 0.9 - 0.5 and 0.8 - 0.6.
    assert "one +0.30 [+0.20 … +0.40]; better in 2 of 2" in text


def test_lower_is_better_turns_the_comparison(tmp_path: Path) -> None:
    metrics = [{"name": "accuracy", "label": "error", "higher_is_better": False}]
    html = page_of(tmp_path, proof("one", metrics=metrics))
    assert "better in 0 of 2" in words(html)
    assert 'class="small behind"' in html


def test_several_claims_are_told_apart(tmp_path: Path) -> None:
    claims = [
        {"text": "First claim.", "rule": "r1", "holds": True, "reason": "0.9 > 0.5"},
        {"text": "Second claim.", "rule": "r2", "holds": False, "reason": "0.1 < 0.2"},
    ]
    text = words(page_of(tmp_path, proof("one", claims=claims, holds=False), "does not hold"))
    assert "1 of 2 claims hold" in text
    assert "First claim. holds Rule, fixed before the run: r1 0.9 &gt; 0.5" in text
    assert "Second claim. does not hold Rule, fixed before the run: r2 0.1 &lt; 0.2" in text


def test_the_page_opens_with_what_each_verdict_means(tmp_path: Path) -> None:
    claims = [{"text": f"Claim {n}.", "rule": "r", "holds": n == 1, "reason": "0.9"} for n in (1, 2)]
    told = {"claims": claims, "holds": False}
    meaning = "Use it where memory is short; it is no better elsewhere."
    text = words(page_of(tmp_path, proof("one", **told, meaning=meaning), "does not hold"))
    head = text.split("what it means time")[1]
    assert head.startswith(f" one does not hold 1 of 2 claims {meaning} ")
    older = words(page_of(tmp_path, proof("one", **told), "does not hold"))
    assert "1 of 2 claims 0.9; 0.9" in older


def test_what_a_package_writes_cannot_become_markup(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    content = proof(
        "one",
        claim=evil,
        rule=evil,
        source=evil,
        data={evil: evil},
        version=evil,
        versions={evil: evil},
        notes=[evil],
        pictures=[evil + ".png"],
        details={evil: [evil]},
        command=evil,
        seeds=[evil, evil],
        methods={"one": {evil: [1, 2]}, evil: {evil: [1, 2]}},
        metrics=[{"name": evil, "label": evil, "unit": evil, "fmt": evil}],
    )
    html = page_of(tmp_path, content)
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_pictures_are_inlined_missing_ones_named_and_outside_ones_refused(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "claim.png").write_bytes(PIXEL)
    (tmp_path / "secret.png").write_bytes(PIXEL)
    html = page_of(tmp_path, proof("one", pictures=["claim.png", "lost.png", "../secret.png", "proof.json"]))
    assert html.count("<img") == 1
    for name in ("lost.png", "../secret.png", "proof.json"):
        assert f"The picture {name} is missing." in html


@pytest.mark.parametrize("content", ['{"package": "one"', "", "[1, 2]", "null"])
def test_a_corrupt_proof_is_shown_as_crashed_with_its_log(tmp_path: Path, content: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "prove.log").write_text("step 1\nMemoryError: <no room>\n")
    text = words(page_of(tmp_path, content))
    assert "No claim was tested, 1 proof crashed" in text
    assert "MemoryError: &lt;no room&gt;" in text


def test_a_missing_proof_and_log_are_named(tmp_path: Path) -> None:
    text = words(report.render(tmp_path, [outcome("one", "crashed", "exit code 70")]))
    assert "one crashed exit code 70" in text
    assert "(no log)" in text


def test_a_crash_after_a_written_proof_gives_no_verdict(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "proof.json").write_text(json.dumps(proof("one")))
    html = report.render(tmp_path, [outcome("one", "crashed", "exit code 70")])
    assert 'class="pill holds"' not in html


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": None}, "proof.json: the field rule is missing"),
        ({"holds": "yes"}, "proof.json: holds should be bool, found 'yes'"),
        ({"wall_seconds": True}, "proof.json: wall_seconds should be int or float, found True"),
        (
            {"methods": {"one": {"accuracy": 0.5}}},
            "methods.one.accuracy should be a list with one number a seed",
        ),
        (
            {"methods": {"one": {"accuracy": [0.5, None]}}},
            "methods.one.accuracy should hold numbers, found None",
        ),
        ({"methods": {"one": {"accuracy": [float("nan")]}}}, "NaN is not a number that can be compared"),
        ({"claims": ["text"]}, "claims[0] should be an object, found 'text'"),
        (
            {"claims": [{"text": "t", "rule": "r", "holds": False}]},
            "proof.json: holds is true, but its claims say otherwise",
        ),
        ({"claims": [{"text": "t", "rule": "r"}]}, "claims[0]: the field holds is missing"),
    ],
)
def test_what_is_wrong_with_a_proof_is_named(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    file = tmp_path / "proof.json"
    file.write_text(json.dumps({k: v for k, v in {**proof("one"), **changes}.items() if v is not None}))
    with pytest.raises(record.RecordError, match=re.escape(message)):
        record.load(file)


def test_the_command_rewrites_the_page_from_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["--runs", str(tmp_path)]) == 2
    assert "run make prove first" in capsys.readouterr().err
    record.write_summary([outcome("one", "crashed", "exit code 3")], 70, tmp_path)
    assert report.main(["--runs", str(tmp_path)]) == 0
    assert "exit code 3" in (tmp_path / "report.html").read_text()
