import asyncio
import copy
import json
from importlib.resources import files

import pytest
from support.fake_task import Lines

from treedecode.accounting import ledger
from treedecode.accounting.budget import Budget
from treedecode.decoding import search_tree
from treedecode.decoding.search_tree import KINDS, STATUSES
from treedecode.reporting.tree_page import strict
from treedecode.search.solve import solve_async
from treedecode.strategies import TreeOfThoughts
from treedecode.tasks import Problem

jsonschema = pytest.importorskip("jsonschema")


def schema(name):
    return json.loads((files("treedecode") / "data" / "schemas" / f"{name}.json").read_text())


@pytest.fixture
def result(make_decoder):
    problems = [Problem(f"problem {i}", f"make {i} of one") for i in range(3)]
    run = solve_async(
        make_decoder(),
        problems,
        strategy=TreeOfThoughts(depth=2, width=3, keep=2),
        task=Lines(),
        verifier=lambda problem, text: -1e300 if "e" in text else float(len(text)),
        budget=Budget(per_problem=Budget(tokens=60)),
    )
    return asyncio.run(run)


@pytest.mark.parametrize("name", ["ledger-1", "search_tree-1"])
def test_schemas_are_schemas(name):
    jsonschema.Draft202012Validator.check_schema(schema(name))
    assert schema(name)["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_versions_are_those_of_the_code():
    assert schema("ledger-1")["properties"]["schema"]["const"] == ledger.SCHEMA
    assert schema("search_tree-1")["properties"]["schema"]["const"] == search_tree.SCHEMA
    node = schema("search_tree-1")["$defs"]["node"]["properties"]
    assert node["status"]["enum"] == list(STATUSES)
    assert node["kind"]["enum"] == list(KINDS)


def test_real_outputs_validate(result):
    written = json.loads(json.dumps(result.ledger.to_json(), allow_nan=False))
    jsonschema.validate(written, schema("ledger-1"))
    assert len(written["problems"]) == 3
    for solution in result.solutions:
        tree = strict(solution.tree.to_json())
        jsonschema.validate(tree, schema("search_tree-1"))
        assert len(tree["nodes"]) > 3


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("total"),
        lambda value: value.update(schema="treedecode.ledger/2"),
        lambda value: value.update(extra=1),
        lambda value: value["total"].update(forwards=-1),
        lambda value: value["total"]["without_sharing"].pop("kv_bytes"),
        lambda value: value["problems"]["problem 1"].pop("seconds"),
    ],
)
def test_a_wrong_ledger_does_not(result, change):
    written = copy.deepcopy(result.ledger.to_json())
    change(written)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(written, schema("ledger-1"))
