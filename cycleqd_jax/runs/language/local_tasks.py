"""GSM8K and ARC-Easy from the user's own files, as tasks of lm-evaluation-harness.

Prompts, filters and metrics are those of the harness's own ``gsm8k`` and ``arc_easy``; only the
questions come from the files, and nothing is looked up on the network. A task is the config that
`lm_eval.tasks.TaskManager.load` takes.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cycleqd_jax.tasks.benchmark import data_folder

GSM8K_FILE = "test_200.jsonl"
ARC_FILE = "arc_easy_test_200.jsonl"
GSM8K_SHOTS = 5

Config = dict[str, Any]
Doc = dict[str, Any]


def gsm8k(file: str | Path | None = None, shots: int = GSM8K_SHOTS) -> Config:
    """Grade-school mathematics (Cobbe et al., 2021, arXiv 2110.14168), answered in words.

    Scores are the harness's: the number after ``####`` ("strict-match"), or the last number there
    is ("flexible-extract"), commas and dollar signs left out.

    Args:
        file: JSON lines with ``question`` and ``answer``; by default
            ``$CYCLEQD_DATA/gsm8k/test_200.jsonl``.
        shots: the first questions of the file are examples in every prompt, and are not asked.

    Raises:
        ValueError: there is no such file, or when the task is loaded a line is not a question.
    """
    path = _file(file, "gsm8k", GSM8K_FILE)
    return {
        "task": "gsm8k_local",
        "custom_dataset": _dataset(path, _gsm8k_doc, shots),
        "output_type": "generate_until",
        "test_split": "test",
        "fewshot_split": "examples" if shots else None,
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": shots,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
            }
        ],
        "generation_kwargs": {
            "until": ["Question:", "</s>", "<|im_end|>"],
            "do_sample": False,
            "temperature": 0.0,
        },
        "filter_list": [
            _first_match("strict-match", r"#### (\-?[0-9\.\,]+)"),
            _first_match("flexible-extract", "(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
        ],
    }


def arc_easy(file: str | Path | None = None) -> Config:
    """School science, several choices a question (Clark et al., 2018, arXiv 1803.05457).

    The likeliest choice counts, by log-likelihood ("acc") and per byte of it ("acc_norm"). Choices
    may be labelled 1 to 4 instead of A to D, and there may be three of them.

    Args:
        file: JSON lines as published; by default ``$CYCLEQD_DATA/arc/arc_easy_test_200.jsonl``.

    Raises:
        ValueError: there is no such file, or when the task is loaded a line is not a question.
    """
    path = _file(file, "arc", ARC_FILE)
    return {
        "task": "arc_easy_local",
        "custom_dataset": _dataset(path, _arc_doc, 0),
        "output_type": "multiple_choice",
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
    }


LOCAL_TASKS: dict[str, Callable[[], Config]] = {"gsm8k_local": gsm8k, "arc_easy_local": arc_easy}
"""Name -> the task on the files below ``$CYCLEQD_DATA``."""


def _first_match(name: str, pattern: str, **options: Any) -> Config:
    regex = {"function": "regex", "regex_pattern": pattern, **options}
    return {"name": name, "filter": [regex, {"function": "take_first"}]}


def _file(file: str | Path | None, folder: str, name: str) -> Path:
    path = data_folder(f"{folder}_local", folder, name) / name if file is None else Path(file)
    if not path.is_file():
        raise ValueError(f"{path}: expected the task's questions, found no such file")
    return path


def _dataset(path: Path, read: Callable[[Any], Doc], examples: int) -> Callable[..., Any]:
    def load(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        docs = list(_docs(path, read))
        if len(docs) <= examples:
            raise ValueError(
                f"{path}: expected more than {examples} questions, since {examples} are examples, "
                f"found {len(docs)}"
            )
        splits = {"test": Dataset.from_list(docs[examples:])}
        return splits | ({"examples": Dataset.from_list(docs[:examples])} if examples else {})

    return load


def _docs(path: Path, read: Callable[[Any], Doc]) -> Iterator[Doc]:
    # Not splitlines: a text may hold a line separator that is none to JSON.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield read(json.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} line {number}: not a question of this task "
                f"({type(error).__name__}: {error})"
            ) from error


def _gsm8k_doc(record: Any) -> Doc:
    if "####" not in record["answer"]:
        raise ValueError("expected a final number after '####' in the answer, found none")
    return {"question": record["question"], "answer": record["answer"]}


def _arc_doc(record: Any) -> Doc:
    choices = record["question"]["choices"]
    labels = [choice["label"] for choice in choices]
    if labels.count(record["answerKey"]) != 1:
        raise ValueError(
            f"expected an answerKey that is one of the labels {labels}, "
            f"found {record['answerKey']!r}"
        )
    return {
        "question": record["question"]["stem"],
        "choices": {"text": [choice["text"] for choice in choices], "label": labels},
        "answerKey": record["answerKey"],
    }
