import json
import math

import numpy as np
import pytest

from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.matrix import InfluenceMatrix

VALUES = [[0.1, -0.2, 1e-17], [3.0, 4.0, 5.0]]
ERRORS = [[0.01, 0.02, 0.03], [0.3, 0.4, 0.5]]


def matrix(values=VALUES, errors=ERRORS, domains=("z", "a", "m"), tasks=("t2", "t1")):
    return InfluenceMatrix(values, domains=domains, tasks=tasks, standard_error_VD=errors)


@pytest.mark.parametrize("errors", [ERRORS, None])
def test_json_gives_back_the_same_matrix_from_a_row_of_the_ledger(errors):
    row = {"stage": 3} | json.loads(json.dumps(matrix(errors=errors).to_json()))
    assert row["influence"]["t2"]["a"] == -0.2
    again = InfluenceMatrix.from_json(row)
    assert (again.domains, again.tasks) == (("z", "a", "m"), ("t2", "t1"))
    assert again.values_VD.tolist() == VALUES
    assert (again.standard_error_VD is None) == (errors is None)
    assert errors is None or again.standard_error_VD.tolist() == errors


def test_json_finds_domains_by_name_and_refuses_gaps():
    row = matrix().to_json()
    row["influence"]["t1"] = dict(reversed(row["influence"]["t1"].items()))
    assert InfluenceMatrix.from_json(row).values_VD.tolist() == VALUES
    del row["influence_se"]["t1"]["m"]
    with pytest.raises(InputError, match="same domains"):
        InfluenceMatrix.from_json(row)


def test_sorting_by_name_moves_names_and_numbers_together():
    given, by_name = matrix(), matrix().sorted_by_name()
    assert (by_name.domains, by_name.tasks) == (("a", "m", "z"), ("t1", "t2"))
    assert by_name.to_json() == given.to_json()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(bad):
    values = np.array(VALUES)
    values[1, 2] = bad
    with pytest.raises(InputError, match="domain m on task t1"):
        matrix(values=values)
    with pytest.raises(InputError, match="standard error of domain m on task t1"):
        matrix(errors=values)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"values": [[1.0, 2.0, 3.0]]}, "shape"),
        ({"errors": [[1.0, 2.0, 3.0]]}, "shape"),
        ({"errors": [[-0.1] * 3] * 2}, "negative"),
        ({"domains": ("a", "a", "b")}, "domains"),
        ({"tasks": ("t", "t")}, "tasks"),
        ({"tasks": (), "values": np.empty((0, 3))}, "tasks"),
    ],
)
def test_what_does_not_fit_is_refused(change, named):
    with pytest.raises(InputError, match=named):
        matrix(**change)


def test_it_keeps_a_copy_that_cannot_be_written():
    values = np.array(VALUES)
    kept = matrix(values=values)
    values[0, 0] = 9.0
    assert kept.values_VD[0, 0] == 0.1
    with pytest.raises(ValueError, match="read-only"):
        kept.values_VD[0, 0] = 9.0


def test_it_prints_a_line_per_domain():
    lines = repr(matrix()).splitlines()
    assert lines[1].split() == ["t2", "t1"]
    assert lines[3].split() == ["a", "-0.2", "±", "0.02", "+4", "±", "0.4"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert "±" not in repr(matrix(errors=None))
