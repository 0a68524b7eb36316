"""Tables live anywhere: at every path, in every folder one may write to, under every object key."""

import os
from urllib.parse import quote

import pytest

from kalm_encoder import PassageTable
from kalm_encoder.errors import InputError
from kalm_encoder.table.location import Location, address
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.table.preflight import check_writable, examine
from pipeline.table.side_files import PROBES
from pipeline.upkeep.facts import table_facts
from pipeline.upkeep.garbage import collect_garbage
from pipeline.upkeep.truncate import truncate
from pipeline.upkeep.verify import verify
from pipeline.workers.local import in_process
from tests.conftest import encode_table, make_texts, write_corpus
from tests.support.s3_server import serve

ODD = [*'"#%*<>?[\\]^{|}~`', "ü", "漢", "e\u0301", "%41", "%", " ", "'", "://"]


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "c.jsonl", make_texts(4))


def problems(table):
    return [check for check in examine(table) if check.problem]


@pytest.mark.parametrize("odd", ODD)
def test_everything_works_beside_and_in_a_table_at_any_path(tmp_path, odd):
    """A tag, too: Lance would make its folder under the escaped path, as an empty twin."""
    parent = tmp_path / f"a{odd.replace('/', '')}b"
    parent.mkdir()
    assert problems(Location(str(parent / f"t{odd.replace('/', '')}.lance"))) == []
    assert list(parent.iterdir()) == []
    assert list(tmp_path.iterdir()) == [parent]


def test_a_table_at_an_odd_path_is_encoded_published_and_rolled_back(model_dir, corpus, tmp_path):
    folder = tmp_path / "".join(ODD).replace("/", "")
    table = folder / "t#ü%41.lance"
    encode_table(model_dir, corpus, table)
    write_corpus(corpus, make_texts(5, seed=1))
    encode_table(model_dir, corpus, table, new_generation=True)
    truncate(str(table), str(folder / "ä.lance"), ratios=(8,))
    assert verify(str(table)).num_problems == 0
    for name in ("t#ü%41.lance", "ä.lance"):
        assert len(PassageTable.open(str(folder / name))) == 4
    assert sorted(os.listdir(folder)) == ["t#ü%41.lance", "ä.lance"]
    assert sorted(os.listdir(tmp_path)) == sorted([folder.name, "c.jsonl"])


def test_a_tag_needs_no_folder_beside_the_table(model_dir, corpus, tmp_path):
    """Where Lance could not make the twin, all was encoded and could never be published."""
    (tmp_path / "%C3%BC").write_text("a file where the twin would be")
    encode_table(model_dir, corpus, tmp_path / "ü" / "t.lance")
    assert len(PassageTable.open(str(tmp_path / "ü" / "t.lance"))) == 4


def test_a_table_lives_under_every_object_key(model_dir, corpus, tmp_path):
    """Lance cuts a URL at `#` and `?`; s3fs takes `%41` as it is, and Lance as A."""
    with serve(tmp_path / "s3") as s3:
        for key in ("d#1/t?ü.lance", "x%41 {y}/t.lance"):
            assert problems(Location(f"s3://bucket/{key}", s3.options)) == []
        job = EncodeJob(
            inputs=(str(corpus),), uri="s3://bucket/d#1/t?ü.lance", model=str(model_dir),
            storage_options=s3.options,
        )  # fmt: skip
        assert run(job, in_process).live
        assert len(PassageTable.open(job.uri, storage_options=s3.options)) == 4
        assert (s3.folder / "bucket" / "d#1" / "t?ü.lance" / "_versions").is_dir()
        assert {p.name for p in (s3.folder / "bucket").iterdir()} == {"d#1", "xA {y}"}


def test_a_tilde_is_the_home_folder_for_the_table_and_all_its_files(
    model_dir, corpus, tmp_path, monkeypatch
):
    """Lance expands it by itself, so that table and plan lay in two places."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    encode_table(model_dir, corpus, "~/t.lance")
    assert list(work.iterdir()) == []
    assert (home / "t.lance" / "_kalm" / "plan").is_dir()
    assert table_facts(Location("~/t.lance"))["passages"] == 4
    assert len(PassageTable.open("~/t.lance")) == 4
    assert address("./~/t.lance") == f"{work}/~/t.lance"


def test_addresses_that_lance_reads_otherwise_are_made_equal(tmp_path):
    table = tmp_path / "a#b ü" / "t.lance"
    for given in (table, str(table), f"file://{quote(str(table))}", f"{table}/"):
        assert address(given) == str(table)
    assert address(f"file://localhost{quote(str(table))}") == str(table)
    assert address("s3://b/x#y?.lance") == "s3://b/x%23y%3F.lance"
    assert address("s3+ddb://b/t.lance?ddbTableName=n") == "s3+ddb://b/t.lance?ddbTableName=n"
    assert address(address("s3://b/x#y.lance")) == address("s3://b/x#y.lance")


@pytest.mark.parametrize("given", ["a\nb.lance", "a\tb.lance", "a\udcffb.lance", "file://t.lance"])
def test_addresses_that_lance_cannot_open_are_refused(given):
    with pytest.raises(InputError, match=r"rename the folder|names no absolute path"):
        address(given)


def test_no_folder_is_left_where_nothing_can_be_made(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="a file lies where a folder must be: move it"):
        check_writable(Location(str(tmp_path / "file" / "sub" / "t.lance")))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    (tmp_path / "file").unlink()
    check_writable(Location(str(tmp_path / "file" / "sub" / "t.lance")))
    assert list(tmp_path.iterdir()) == []


def test_the_longest_name_that_a_disk_takes_is_a_table(tmp_path):
    longest = tmp_path / f"{'n' * 249}.lance"
    assert problems(Location(str(longest))) == []
    with pytest.raises(InputError, match="is too long for the disk: shorten it"):
        check_writable(Location(str(tmp_path / f"{'n' * 250}.lance")))


def test_gc_removes_what_a_check_left_that_was_killed(model_dir, corpus, tmp_path):
    table = Location(str(tmp_path / "t.lance"))
    encode_table(model_dir, corpus, tmp_path / "t.lance")
    left = tmp_path / "t.lance" / PROBES / ".kalm-probe-1" / "t.lance" / "data" / "x.lance"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x")
    os.utime(left, (0, 0))
    collect_garbage(table)
    assert not left.exists()


@pytest.fixture
def nobody(tmp_path_factory):
    """A folder of root's in which this process, as another user, may not write."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    folder = tmp_path_factory.mktemp("others")
    for parent in (folder, *folder.parents[:3]):  # the last one is that of all runs
        parent.chmod(0o755)
    os.seteuid(65534)
    yield folder
    os.seteuid(0)


def test_a_read_only_folder_is_no_matter_of_a_bucket(nobody):
    with pytest.raises(InputError, match="check the owner and the mode of the folder") as refused:
        check_writable(Location(str(nobody / "t.lance")))
    assert "bucket" not in str(refused.value)


def test_only_the_table_itself_need_be_writable(nobody):
    """The remedy of the message: the owner lets this user write."""
    os.seteuid(0)
    (nobody / "ü.lance").mkdir()
    os.chown(nobody / "ü.lance", 65534, -1)
    os.seteuid(65534)
    assert problems(Location(str(nobody / "ü.lance"))) == []
