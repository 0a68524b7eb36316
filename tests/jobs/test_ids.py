"""Ids on the command line: the same file names the same passages for every command."""

import codecs
import json
import shutil

import pytest

from jobs.manage import delete
from jobs.options import read_ids, split_list
from jobs.rerank import rerank
from kalm_encoder import PassageTable
from kalm_encoder.errors import InputError, MissingIdsError
from tests.conftest import encode_table

ODD = ["a\u2028b", "c\u0085d", "e\x0bf", "g\x1ch", "i\rj", " k ", "l,m", "n\u2029", "\ufeffo", "7"]
"""Ids that Python's splitlines would cut, or that strip would change."""


@pytest.fixture(scope="module")
def encoded(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    rows = [json.dumps({"id": i, "text": f"text of {i}"}) for i in [*ODD[:-1], 7, "rest"]]
    (folder / "c.jsonl").write_text("\n".join(rows), encoding="utf-8")
    encode_table(model_dir, folder / "c.jsonl", folder / "t.lance")
    return folder / "t.lance"


@pytest.fixture
def ranked(encoded, capsys):
    """The ids and results of `kalm rerank --json`."""

    def run(**options):
        rerank(str(encoded), query="q", as_json=True, top_k=0, **options)
        return json.loads(capsys.readouterr().out)["results"]

    return run


@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rerank_and_delete_read_the_same_ids_from_a_file(
    encoded, ranked, tmp_path, capsys, bom, end
):
    file = tmp_path / "ids"
    file.write_bytes(bom + end.join(["7", *ODD[:-1], "", ""]).encode())
    assert read_ids(file) == ["7", *ODD[:-1]]
    assert {r["id"] for r in ranked(ids_file=file)} == set(ODD)
    copy = shutil.copytree(encoded, tmp_path / "t.lance")
    delete(str(copy), file)
    assert "deleted 10 passages" in capsys.readouterr().out
    assert PassageTable.open(str(copy)).known([*ODD, "rest"]) == {"rest"}


def test_a_file_of_ids_that_cannot_be_read_is_named(encoded, tmp_path):
    file = tmp_path / "ids"
    file.write_text("p1\n", encoding="utf-16")
    for command in (lambda: rerank(str(encoded), query="q", ids_file=file),
                    lambda: delete(str(encoded), file)):  # fmt: skip
        with pytest.raises(InputError, match=r"ids is not UTF-8 .*convert it to UTF-8"):
            command()
    file.write_text("7\n", encoding="utf-8")  # the remedy
    rerank(str(encoded), query="q", ids_file=file)
    with pytest.raises(InputError, match="holds no id"):
        file.write_text("\n\n")
        delete(str(encoded), file)


def test_spaces_after_the_commas_of_a_list_do_not_count(ranked):
    assert {r["id"] for r in ranked(ids="7, rest ,\t7,")} == {"7", "rest"}
    assert split_list(" a,b , c c,,") == ["a", "b", "c c"]
    assert split_list("") == []


def test_missing_ids_are_handled_as_asked(ranked):
    with pytest.raises(MissingIdsError, match="'x'"):
        ranked(ids="7, x, rest")
    assert {r["id"] for r in ranked(ids="7, x, rest", on_missing="drop")} == {"7", "rest"}
    last = ranked(ids="7, x, rest", on_missing="last")[-1]
    assert last == {"id": "x", "score": 0.0, "margin": None, "ratio": None}
    with pytest.raises(InputError, match="must be error, drop or last"):
        ranked(ids="7", on_missing="skip")
