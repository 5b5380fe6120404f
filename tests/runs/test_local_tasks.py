"""GSM8K and ARC-Easy from files: small ones written here, and the public ones where they are."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import cycleqd_jax

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install '.[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from cycleqd_jax.runs.language.local_tasks import arc_easy, gsm8k


def question(answer: str, labels: str, key: str) -> dict[str, Any]:
    choices = [{"text": f"{answer} {label}", "label": label} for label in labels]
    return {"id": "x", "question": {"stem": "Why?", "choices": choices}, "answerKey": key}


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def load(config: dict[str, Any]) -> Any:
    (task,) = TaskManager(include_defaults=False).load([config])["tasks"].values()
    return task


def score(task: Any, doc: Any, answers: list[Any]) -> dict[str, Any]:
    """What the harness's own filters and metrics make of answers to one question."""
    kind = task.OUTPUT_TYPE
    task._instances = [
        Instance(request_type=kind, doc=doc, arguments=("", {}), idx=i, resps=[answer])
        for i, answer in enumerate(answers)
    ]
    task.apply_filters()
    found = {}
    for name in task.instances[0].filtered_resps:
        responses = [instance.filtered_resps[name] for instance in task.instances]
        for metric, value in task.process_results(doc, responses).items():
            found[f"{metric}/{name}"] = value
    return found


def test_numbers_count_with_and_without_commas(tmp_path: Path) -> None:
    records = [
        {"question": f"{i}?", "answer": f"It is <<1+1=2>>2.\n#### 2,12{i}"} for i in range(7)
    ]
    task = load(gsm8k(write(tmp_path / "test.jsonl", records)))
    assert [doc["question"] for doc in task.test_docs()] == ["5?", "6?"]
    assert [doc["question"] for doc in task.fewshot_docs()] == [f"{i}?" for i in range(5)]
    doc = task.test_docs()[0]
    strict, flexible = "exact_match/strict-match", "exact_match/flexible-extract"
    for text, expected in (
        ("So it is 9.\n#### 2,125", (1, 1)),
        ("#### 2125", (1, 1)),
        ("The answer is $2,125.", (0, 1)),
        ("#### 2126", (0, 0)),
        ("no idea", (0, 0)),
    ):
        found = score(task, doc, [text])
        assert (found[strict], found[flexible]) == expected, text


def test_choices_may_be_numbered_and_three(tmp_path: Path) -> None:
    records = [question("long", "ABCD", "C"), question("a", "1234", "4"), question("b", "ABC", "A")]
    task = load(arc_easy(write(tmp_path / "arc.jsonl", records)))
    docs = list(task.test_docs())
    assert [task.doc_to_target(doc) for doc in docs] == [2, 3, 0]
    assert task.doc_to_choice(docs[2]) == ["b A", "b B", "b C"]
    likely = [(-2.0, False), (-3.0, False), (-1.0, True), (-4.0, False)]
    assert score(task, docs[0], likely)["acc/none"] == 1
    assert score(task, docs[1], likely)["acc/none"] == 0


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    record = {"question": "How many?\u2028Say it.", "answer": "A lot.\x85\n#### 5"}
    path = tmp_path / "test.jsonl"
    path.write_text((json.dumps(record, ensure_ascii=False) + "\n\n") * 2, encoding="utf-8")
    assert list(load(gsm8k(path, shots=1)).test_docs()) == [record]


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", [question("a", "ABCD", "A"), question("a", "ABCD", "E")])
    with pytest.raises(ValueError, match=r"bad\.jsonl line 2: .*answerKey"):
        load(arc_easy(path))
    write(path, [{"question": "?", "answer": "5"}])
    with pytest.raises(ValueError, match=r"bad\.jsonl line 1: .*####"):
        load(gsm8k(path))
    write(path, [{"question": "?", "answer": "#### 5"}])
    with pytest.raises(ValueError, match="expected more than 5 questions"):
        load(gsm8k(path))
    with pytest.raises(ValueError, match="found no such file"):
        arc_easy(tmp_path / "none.jsonl")


def test_every_question_of_the_public_files_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Path(cycleqd_jax.__file__).parents[2] / "shared" / "data"
    data = Path(os.environ.get("CYCLEQD_DATA") or beside)
    if not ((data / "arc").is_dir() and (data / "gsm8k").is_dir()):
        pytest.skip(f"no arc/ and gsm8k/ in {data}: set CYCLEQD_DATA")
    monkeypatch.setenv("CYCLEQD_DATA", str(data))
    docs = list(load(arc_easy()).test_docs())
    assert len(docs) == 200
    assert sum(doc["choices"]["label"][0] == "1" for doc in docs) == 8
    assert sum(len(doc["choices"]["label"]) == 3 for doc in docs) == 1
    task = load(gsm8k())
    assert len(task.test_docs()) == 195
    strict = [
        score(task, doc, [doc["answer"]])["exact_match/strict-match"] for doc in task.test_docs()
    ]
    assert sum(strict) == 195
