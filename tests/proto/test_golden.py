"""golden/*.json against the implementation, and against the reference that wrote them."""

import json

import golden_vectors
import numpy as np
import pytest
from hash_cases import batch_of
from hash_reference import Request

from engrampool_proto.builders import blueprint


@pytest.fixture(params=golden_vectors.CONFIGS)
def golden(request):
    return json.loads((golden_vectors.GOLDEN / f"{request.param}.json").read_text())


def test_the_reference_still_gives_it(golden):
    assert golden_vectors.document(golden["family"]) == golden


def test_there_is_no_file_too_many():
    assert {path.stem for path in golden_vectors.GOLDEN.iterdir()} == set(golden_vectors.CONFIGS)


def test_the_implementation_gives_it(golden, tokenizer):
    spec = blueprint(golden["config"], tokenizer).spec
    assert spec.name == golden["family"]
    found_map = spec.token_map and {"size": spec.token_map.size, "xxh3_128": spec.token_map.digest}
    assert found_map == golden["token_map"]
    assert sorted(golden["tables"]) == sorted(map(str, spec.layers))
    for layer, expected in golden["tables"].items():
        table = spec.table(int(layer))
        assert table.num_rows == expected["num_rows"]
        assert list(table.hash.head_rows()) == expected["head_sizes"]
        constants = table.hash.to_json()
        assert {key: constants[key] for key in expected["constants"]} == expected["constants"]
    for request in golden["requests"]:
        rows = {int(layer): ids for layer, ids in request.pop("rows").items()}
        found = spec.hash(batch_of([Request(**request)]))
        assert {layer: ids.tolist() for layer, ids in found.items()} == rows
        assert all(ids.dtype == np.uint32 for ids in found.values())
