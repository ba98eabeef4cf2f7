"""Each reader gives a data set's examples as they are, and says where a bad row is."""

import csv
import json
import logging
import subprocess
import sys

import pytest

from relattn.entsum import EntsumFields, load_entsum
from relattn.examples import Fields
from relattn.readers import load_aclsum, load_csv, load_ctrlsum, load_dataset, load_jsonl, load_newts
from shared_core import InputError

NEWTS_HEADER = ["", "AssignmentId", "docId", "article", "tid1", "tid2", "words1", "words2", "phrases1",
                "phrases2", "sentences1", "sentences2", "summary1", "summary2"]  # fmt: skip


def newts_row(document="d7", words1="goal, match, league, ", words2="court, judge"):
    text = "A long\narticle, with a comma."
    controls = [words1, words2, "a goal, a match,", "the court", "On football.", "On a trial, in court."]
    return ["0", "a1", document, text, "3", "9", *controls, "About football.", "About a trial."]


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_newts_gives_two_examples_a_row_and_keeps_a_last_word_without_comma(tmp_path):
    first, second = load_newts(write_csv(tmp_path / "n.csv", [NEWTS_HEADER, newts_row()]))
    assert first.control == ("goal", "match", "league")
    assert second.control == ("court", "judge")  # the released preprocessing would lose "judge"
    assert (first.summary, first.other_summaries) == ("About football.", ("About a trial.",))
    assert first.document_id == second.document_id == "d7"
    assert first.id != second.id
    assert first.document == "A long\narticle, with a comma."
    phrases, _ = load_newts(tmp_path / "n.csv", control="phrases")
    assert phrases.control == ("a goal", "a match")
    _, sentence = load_newts(tmp_path / "n.csv", control="sentences")
    assert sentence.control == ("On a trial, in court.",)


def test_newts_rows_of_one_assignment_and_article_are_told_apart(tmp_path):
    table = [NEWTS_HEADER, newts_row(words1="goal, match"), newts_row(words1="coach, team")]
    found = load_newts(write_csv(tmp_path / "n.csv", table))
    assert len({example.id for example in found}) == 4
    assert {example.document_id for example in found} == {"d7"}


def test_long_articles_are_read_and_the_process_keeps_its_own_limit_of_cells(tmp_path):
    row = newts_row()
    row[3] = "word " * 40_000
    before = csv.field_size_limit()
    assert len(row[3]) > before
    found = load_newts(write_csv(tmp_path / "n.csv", [NEWTS_HEADER, row]))
    assert found[0].document.split() == ["word"] * 40_000
    assert csv.field_size_limit() == before


def test_newts_says_which_columns_are_missing(tmp_path):
    path = write_csv(tmp_path / "n.csv", [["docId", "article"], ["d", "text"]])
    with pytest.raises(
        InputError, match=r"n.csv: line 2, words1, words2, .*: is missing: found docId, article"
    ):
        load_newts(path)
    with pytest.raises(InputError, match="control: expected one of words, phrases, sentences"):
        load_newts(path, control="topics")


def test_a_bad_row_is_named_by_its_line_even_behind_texts_of_several_lines(tmp_path):
    rows = [NEWTS_HEADER, newts_row("d1"), newts_row("d2", words1=" , "), newts_row("d3")]
    path = write_csv(tmp_path / "n.csv", rows)
    # line 1 is the header, each article takes two lines: the second row begins at line 4
    with pytest.raises(InputError, match=r"n.csv: line 4, control: is empty: expected a word or phrase"):
        load_newts(path)


def test_skip_bad_keeps_the_other_rows_and_warns(tmp_path, caplog):
    rows = [json.dumps({"document": "a b", "control": "a", "summary": "x"}), "{broken", json.dumps([1]),
            json.dumps({"document": "", "control": "a"}), json.dumps({"text": "no"}),
            json.dumps({"document": "c d", "control": ["c", "d"], "id": 5})]  # fmt: skip
    path = write_lines(tmp_path / "x.jsonl", rows)
    with caplog.at_level(logging.WARNING, "relattn"):
        found = load_jsonl(path, skip_bad=True)
    assert [(e.id, e.control, e.summary) for e in found] == [("1", ("a",), "x"), ("5", ("c", "d"), None)]
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        f"{path}: line 2: is not JSON: Expecting property name enclosed in double quotes at column 2",
        f"{path}: line 3: expected a JSON object (got [1])",
        f"{path}: line 4, document: is empty: expected a text",
        f"{path}: line 5, document: is missing: found text",
    ]
    with pytest.raises(InputError, match=r"x.jsonl: line 2: is not JSON"):
        load_jsonl(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"document": 3, "control": "a"}, r"line 1, document: expected text \(got 3\)"),
        ({"document": "a", "control": 3}, "line 1, control: expected a string or a list of strings"),
        ({"document": "a", "control": ["b", 3]}, "line 1, control: expected a string or a list of strings"),
        ({"document": "a", "control": []}, "line 1, control: is empty"),
        ({"document": "a", "control": "b", "summary": 3}, "line 1, summary: expected text"),
    ],
)
def test_each_wrong_field_is_named(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        load_jsonl(write_lines(tmp_path / "x.jsonl", [json.dumps(row)]))


STRANGE = "one\u2028two\u2029three\x85four"  # line ends for str.splitlines, letters for JSON


def test_only_a_newline_ends_a_line_of_json(tmp_path):
    rows = [json.dumps({"document": STRANGE, "control": "a"}, ensure_ascii=False), '{"broken']
    path = write_lines(tmp_path / "x.jsonl", rows)
    with pytest.raises(InputError, match=r"x.jsonl: line 2: is not JSON"):
        load_jsonl(path)
    path.write_bytes(rows[0].encode() + b"\r\n\r\n" + rows[0].encode())
    assert [(e.id, e.document) for e in load_jsonl(path)] == [("1", STRANGE), ("3", STRANGE)]


def test_only_a_newline_ends_a_line_of_aclsum(monkeypatch):
    paper = {"id": "p", "sentences": {"abstract": [STRANGE]}, "summary": {"challenge": "s"}}
    line = json.dumps(paper, ensure_ascii=False).encode() + b"\n"
    monkeypatch.setattr("relattn.readers.wheels.member_bytes", lambda *_: line)
    [example] = load_aclsum(source="abstract", aspects=["challenge"])
    assert example.document == STRANGE


def test_csv_columns_may_have_other_names_and_controls_several_phrases(tmp_path):
    path = write_csv(
        tmp_path / "x.csv", [["text", "about", "gold"], ["one", "a; b c", "s"], ["one", "d", "t"]]
    )
    first, second = load_csv(path, Fields(document="text", control="about", summary="gold"))
    assert first.control == ("a", "b c")
    assert (first.other_summaries, second.other_summaries) == (("t",), ("s",))
    assert first.document_id == second.document_id  # equal texts are one document
    write_csv(path, [["document", "control"], ["only one"]])
    with pytest.raises(InputError, match=r"x.csv: line 2: expected 2 columns as in the header, found 1"):
        load_csv(path)


def test_a_file_that_is_not_text_empty_or_missing_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"document,control\n\xff\xfe")
    with pytest.raises(InputError, match=r"x.csv: is not UTF-8 text"):
        load_csv(path)
    path.write_text("")
    with pytest.raises(InputError, match=r"x.csv: is empty: expected a header line"):
        load_csv(path)
    path.write_text("document,control\n")
    with pytest.raises(InputError, match=r"x.csv: holds no example"):
        load_csv(path)
    with pytest.raises(FileNotFoundError):
        load_jsonl(tmp_path / "nowhere.jsonl")


def test_two_rows_of_one_id_are_refused(tmp_path):
    row = json.dumps({"document": "a", "control": "b", "id": "same"})
    with pytest.raises(InputError, match=r"x.jsonl: id: expected ids that differ, found one twice"):
        load_jsonl(write_lines(tmp_path / "x.jsonl", [row, row]))


def test_a_hugging_face_dataset_is_read():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {"document": ["a", "b"], "control": [["x"], ["y", "z"]], "summary": ["s", None]}
    )
    assert [(e.id, e.control, e.summary) for e in load_dataset(rows)] == [
        ("0", ("x",), "s"),
        ("1", ("y", "z"), None),
    ]
    with pytest.raises(InputError, match="row 0, document: is missing: found text"):
        load_dataset([{"text": "a"}])


def test_ctrlsum_reads_separate_and_joined_files(tmp_path):
    write_lines(tmp_path / "test.source", ["one text", "another => text"])
    write_lines(tmp_path / "test.target", ["s1", "s2"])
    write_lines(tmp_path / "test.oracleword", ["a | b c", "d"])
    apart = load_ctrlsum(tmp_path)
    assert [(e.document, e.control, e.summary) for e in apart] == [
        ("one text", ("a", "b c"), "s1"), ("another => text", ("d",), "s2"),
    ]  # fmt: skip
    (tmp_path / "test.source").unlink()
    write_lines(tmp_path / "test.oraclewordsource", ["a | b c => one text", "d => another => text"])
    assert load_ctrlsum(tmp_path) == apart
    write_lines(tmp_path / "test.oraclewordsource", ["a | b c => one text", "no arrow"])
    with pytest.raises(InputError, match="oraclewordsource: line 2 has no ' => '"):
        load_ctrlsum(tmp_path)
    write_lines(tmp_path / "test.oraclewordsource", ["a => b"])
    with pytest.raises(InputError, match="found 1 sources, 1 keywords, 2 targets"):
        load_ctrlsum(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"val.target"):
        load_ctrlsum(tmp_path, "val")


def test_entsum_joins_annotations_with_articles(tmp_path):
    articles = tmp_path / "nyt" / "1999"
    articles.mkdir(parents=True)
    (articles / "12.txt").write_text("A text about Ann and Bob.")
    (articles / "13.xml").write_text(
        '<nitf><body><block class="lead_paragraph"><p>Lead.</p></block>'
        '<block class="full_text"><p>First <i>p</i>.</p>'
        "<p>Second.</p></block></body></nitf>"
    )
    path = write_lines(tmp_path / "a.jsonl", [
        json.dumps({"doc_id": 12, "entity_name": "Ann", "summaries": ["s1", "s2"], "other": 1}),
        json.dumps({"doc_id": "13", "entity_name": "Bob", "summaries": "t"}),
    ])  # fmt: skip
    found = load_entsum(path, tmp_path / "nyt")
    assert [(e.document_id, e.control, e.summary) for e in found] == [
        ("12", ("Ann",), "s1"), ("12", ("Ann",), "s2"), ("13", ("Bob",), "t"),
    ]  # fmt: skip
    assert found[0].other_summaries == ()  # a second summary about the same entity is no contrast
    assert found[2].document == "First p.\n\nSecond."


def test_entsum_joins_the_sentences_of_one_summary(tmp_path):
    (tmp_path / "12.txt").write_text("text")
    rows = [
        {"doc_id": 12, "entity": "Ann", "summary_sentences": ["She left.", "She came back."]},
        {"doc_id": 12, "entity": "Bob", "summaries": ["He stayed.", "He did not go."]},
    ]
    found = load_entsum(write_lines(tmp_path / "a.jsonl", map(json.dumps, rows)), tmp_path)
    assert [(e.control, e.summary) for e in found] == [
        (("Ann",), "She left. She came back."), (("Bob",), "He stayed."), (("Bob",), "He did not go."),
    ]  # fmt: skip


def test_entsum_fails_with_the_names_that_it_found(tmp_path):
    (tmp_path / "12.txt").write_text("text")
    path = write_lines(tmp_path / "a.jsonl", [json.dumps({"doc": 12, "who": "Ann", "gold": "s"})])
    with pytest.raises(
        InputError, match=r"line 1, document_id: is missing: looked for .* found doc, who, gold"
    ):
        load_entsum(path, tmp_path)
    named = EntsumFields("doc", "who", "gold")
    assert load_entsum(path, tmp_path, named)[0].control == ("Ann",)
    (tmp_path / "12.txt").unlink()
    with pytest.raises(InputError, match=r"article 12 is missing: expected 12.txt or .xml"):
        load_entsum(path, tmp_path, named)
    with pytest.raises(InputError, match="is no folder"):
        load_entsum(path, tmp_path / "nowhere")


def test_aclsum_has_three_aspects_a_paper_and_is_never_imported():
    code = """
import sys
from relattn.readers import load_aclsum
found = load_aclsum("val", source="abstract")
print(len(found), len({e.document_id for e in found}), sorted({e.control for e in found}))
print("aclsum" in sys.modules)
print(all(len(e.other_summaries) == 2 and e.summary not in e.other_summaries for e in found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    aspects = "[('approach',), ('challenge',), ('outcome',)]"
    assert done.stdout.splitlines() == [f"150 50 {aspects}", "False", "True"]
    with pytest.raises(InputError, match="split: expected one of train, val, test"):
        load_aclsum("dev")
    with pytest.raises(InputError, match="aspects: expected one of challenge, approach, outcome"):
        load_aclsum(aspects=["method"])


def test_the_readers_are_names_of_the_package():
    import relattn

    for name in (
        "load_newts",
        "load_entsum",
        "load_aclsum",
        "load_jsonl",
        "load_csv",
        "load_ctrlsum",
        "load_dataset",
    ):
        assert callable(getattr(relattn, name))
        assert name in relattn.__all__
