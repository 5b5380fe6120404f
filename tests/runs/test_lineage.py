import math

import pytest

from cycleqd_jax.runs.records.jsonl import JsonlWriter
from cycleqd_jax.runs.records.lineage import Birth, FamilyTree, LineageError, read_births


def birth(id, parents=(), generation=0):
    return Birth(id, tuple(parents), None if not parents else 0, generation, {"coding": 0.5})


@pytest.fixture
def family():
    #  0   1   2      seeds
    #   \ / \ /
    #    3   4        generation 1
    #     \ / \
    #      5   6      generation 2; 6 has one elite as both parents
    return FamilyTree(
        [
            *(birth(i) for i in range(3)),
            birth(3, (0, 1), 1),
            birth(4, (1, 2), 1),
            birth(5, (4, 3), 2),
            birth(6, (4, 4), 2),
        ]
    )


def test_births_read_back_as_they_were_written(tmp_path):
    births = [
        Birth(0, (), None, 0, {"coding": 0.1, "shell": math.inf}, {"seed": "expert/coding"}),
        Birth(7, (0, 0), 1, 3, {"coding": 0.25, "shell": 0.5}, {"weights": [0.9, 1.1]}, "ab", 1.5),
    ]
    path = tmp_path / "lineage.jsonl"
    with JsonlWriter(path) as writer:
        for child in births:
            writer.write(child.to_row())
    assert read_births(path) == births


@pytest.mark.parametrize(
    "change", [{"parents": "12"}, {"id": "1"}, {"generation": None}, {"operator": []}]
)
def test_a_row_with_wrong_types_is_named(change):
    row = {**birth(3, (0, 1), 1).to_row(), **change}
    with pytest.raises(LineageError, match="birth row: expected numbers, a list and mappings"):
        Birth.from_row(row)


def test_a_row_that_is_no_birth_is_named(tmp_path):
    path = tmp_path / "lineage.jsonl"
    path.write_text('{"id": 1}\n')
    with pytest.raises(
        ValueError, match=r"lineage\.jsonl: birth row: expected the keys.*'archive'"
    ):
        read_births(path)


def test_ancestors_come_once_each_and_parents_first(family):
    assert [b.id for b in family.ancestors(5)] == [0, 1, 2, 3, 4]
    assert [b.id for b in family.ancestors(6)] == [1, 2, 4]
    assert [b.id for b in family.ancestors(6, 5, 6)] == [0, 1, 2, 3, 4]
    assert family.ancestors(0) == []
    assert family.birth(5).parents == (4, 3)


def test_a_line_of_ten_thousand_generations_is_no_problem():
    births = [birth(0)] + [birth(i, (i - 1, i - 1), i) for i in range(1, 10_000)]
    assert len(FamilyTree(births).ancestors(9_999)) == 9_999


def test_unknown_and_repeated_ids_are_refused(family):
    with pytest.raises(ValueError, match="no model has the id 99; there are 7"):
        family.birth(99)
    with pytest.raises(LineageError, match="child 1 of generation 1 names the parent 42, which is"):
        FamilyTree([birth(1, (42, 42), 1)]).ancestors(1)
    with pytest.raises(LineageError, match="child 1 is of generation 1 and its parent 2 of 1"):
        FamilyTree([birth(1, (2, 2), 1), birth(2, (1, 1), 1)]).ancestors(1)
    with pytest.raises(LineageError, match="the id 1 was given twice"):
        FamilyTree([birth(1), birth(1)])
