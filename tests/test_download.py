import pytest
from hub import Hub

from configurator import UserError
from quartz import download

REPO = "someone/corpus"


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, in the hub's place, with three parquet files."""
    hub = Hub(REPO, "data")
    hub.files = {f"data/train-{n}.parquet": bytes([n]) * 300_000 + b"end" for n in range(3)}
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    yield hub
    hub.close()


def get(folder, **more):
    return download.hub_files(REPO, [("refs/nowhere", "data"), ("main", "data")], folder, **more)


def test_the_parquet_files_of_a_data_set_are_downloaded_once(hub, tmp_path):
    paths = get(tmp_path / "source")
    assert [path.name for path in paths] == [f"data-train-{n}.parquet" for n in range(3)]
    assert [path.read_bytes() for path in paths] == [*hub.files.values()]
    hub.requests.clear()
    assert get(tmp_path / "source") == paths and not hub.requests, "without a network too"


def test_only_as_many_files_as_asked_for(hub, tmp_path):
    assert len(get(tmp_path, max_files=2)) == 2 and len(list(tmp_path.glob("*.parquet"))) == 2
    assert len(get(tmp_path, max_files=5)) == 3


def test_a_download_that_breaks_in_the_middle_goes_on_there(hub, tmp_path):
    hub.faults = {"data/train-1.parquet": [100_000, 150_000, 7]}
    paths = get(tmp_path)
    assert [path.read_bytes() for path in paths] == [*hub.files.values()]
    assert hub.ranges == [None, None, "bytes=100000-", "bytes=250000-", "bytes=250007-", None]


def test_what_an_earlier_process_had_is_used(hub, tmp_path, monkeypatch):
    hub.faults = {"data/train-1.parquet": [100_000] + [503] * download.TRIES}
    with pytest.raises(UserError, match="run it again to go on, or use --source=PATH"):
        get(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == ["data-train-0.parquet"]
    hub.ranges.clear()
    assert [path.read_bytes() for path in get(tmp_path)] == [*hub.files.values()]
    assert hub.ranges == ["bytes=100000-", None]


def test_a_server_that_knows_no_ranges_sends_all_again(hub, tmp_path):
    hub.faults = {"data/train-0.parquet": [100_000, "whole"]}
    assert get(tmp_path)[0].read_bytes() == hub.files["data/train-0.parquet"]


def test_wrong_contents_are_found_by_their_sum(hub, tmp_path):
    hub.faults = {"data/train-0.parquet": ["junk"] * download.TRIES}
    with pytest.raises(UserError, match="do not have the sum"):
        get(tmp_path)
    assert not list(tmp_path.glob("*.parquet*"))
    (tmp_path / "data-train-0.parquet.tmp").write_bytes(b"x" * 1000)  # a part of something else
    hub.faults = {}
    assert get(tmp_path)[0].read_bytes() == hub.files["data/train-0.parquet"]
    (tmp_path / "data-train-1.parquet").unlink()
    (tmp_path / "data-train-1.parquet.tmp").write_bytes(b"x" * 400_000)  # longer than the whole
    assert get(tmp_path)[1].read_bytes() == hub.files["data/train-1.parquet"]


def test_a_process_that_ended_just_before_the_name_was_given_needs_no_byte_more(hub, tmp_path):
    (tmp_path / "data-train-0.parquet.tmp").write_bytes(hub.files["data/train-0.parquet"])
    assert get(tmp_path)[0].read_bytes() == hub.files["data/train-0.parquet"]


@pytest.mark.parametrize("code", [403, 404])
def test_an_error_that_stays_is_not_tried_again(hub, tmp_path, code):
    hub.faults = {"data/train-0.parquet": [code] * 9}
    with pytest.raises(UserError, match=str(code)):
        get(tmp_path)
    assert len(hub.ranges) == 1


def test_a_hub_that_can_not_be_reached_is_one_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="--source=PATH"):
        get(tmp_path)


def test_a_data_set_without_parquet_files_is_one_problem(hub, tmp_path):
    hub.files = {}
    with pytest.raises(UserError, match=f"no parquet files of {REPO}"):
        get(tmp_path)
    assert not (tmp_path / "files.json").exists()


def test_a_disk_without_room_is_one_problem_before_the_download(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match="make room, or take fewer with --max_files"):
        get(tmp_path)
    assert not hub.ranges


def test_a_full_disk_in_the_middle_keeps_what_is_there(hub, tmp_path, monkeypatch):
    def full(url, partial, have, bar):
        partial.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_append", full)
    with pytest.raises(UserError, match="the disk is full"):
        get(tmp_path)
    assert (tmp_path / "data-train-0.parquet.tmp").read_bytes() == b"a part"
