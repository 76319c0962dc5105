"""From source to folder: every way a model can be out of reach, without any network."""

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ernie_lab.checkpoint.errors import ModelUnavailable
from ernie_lab.checkpoint.hub import Located, locate

MODEL = "baidu/ERNIE-4.5-21B-A3B-PT"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
File = namedtuple("File", "filename file_size will_download")
Usage = namedtuple("Usage", "total used free")


class Hub:
    """Stands in for `snapshot_download`: records its calls, answers as told."""

    def __init__(self, folder: Path, files: list[File], error: Exception | None = None) -> None:
        self.folder, self.files, self.error = folder, files, error
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, *, dry_run: bool = False, **asked: Any) -> Any:
        self.calls.append({"repo_id": repo_id, "dry_run": dry_run, **asked})
        if dry_run:
            if self.error is not None and not isinstance(self.error, RevisionNotFoundError):
                raise DryRunError("cannot be performed") from self.error
            return self.files
        if self.error is not None:
            raise self.error
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    def make(
        *, error: Exception | None = None, needed: int = 100, free: int = 1000, config: bool = True
    ) -> Hub:
        folder = tmp_path / "snapshots" / COMMIT
        folder.mkdir(parents=True)
        if config:
            (folder / "config.json").write_text("{}")
        files = [File("model.safetensors", needed, True), File("config.json", 5, False)]
        stand_in = Hub(folder, files, error)
        monkeypatch.setattr("ernie_lab.checkpoint.download.snapshot_download", stand_in)
        monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(free, 0, free))
        monkeypatch.chdir(tmp_path)
        return stand_in

    return make


def answered(error: type[Any], status: int = 404) -> Exception:
    response = httpx2.Response(status, request=httpx2.Request("GET", "https://hub.invalid"))
    made = error("no", response=response)
    assert isinstance(made, Exception)
    return made


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    expected = Located(tmp_path.resolve(), tmp_path.name, None)
    assert locate(tmp_path) == locate(str(tmp_path)) == expected


def test_a_model_on_the_hub(hub: Callable[..., Hub]) -> None:
    stand_in, told = hub(), list[str]()
    located = locate(MODEL, revision="v2", announce=told.append)
    assert located == Located(stand_in.folder, MODEL, COMMIT)
    assert [call["dry_run"] for call in stand_in.calls] == [True, False]
    for call in stand_in.calls:
        assert (call["repo_id"], call["revision"]) == (MODEL, "v2")
        assert "*.safetensors" in call["allow_patterns"]
        assert not {"*.bin", "*.py"} & set(call["allow_patterns"])
    assert told == [f"downloading {MODEL}: 100 B, 1.0 kB free on disk"]


def test_nothing_is_announced_when_all_is_cached(hub: Callable[..., Hub]) -> None:
    stand_in, told = hub(), list[str]()
    stand_in.files = [File("model.safetensors", 10**12, False)]
    assert locate(MODEL, announce=told.append).revision == COMMIT
    assert told == []


def test_too_little_disk_is_found_out_before_the_download(hub: Callable[..., Hub]) -> None:
    stand_in = hub(needed=43_700_000_000, free=12_000_000_000)
    with pytest.raises(ModelUnavailable, match=r"needs 43.7 GB on disk, 12.0 GB are free"):
        locate(MODEL)
    assert [call["dry_run"] for call in stand_in.calls] == [True]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answered(GatedRepoError, 403), r"is gated: accept its licence"),
        (answered(RepositoryNotFoundError), r"the hub has no model 'baidu/.*No such folder"),
        (answered(RevisionNotFoundError), r"has no revision 'v2'"),
        (HFValidationError("bad"), r"neither a folder here nor a valid hub id"),
        (LocalEntryNotFoundError("no"), r"at revision 'v2' is not in the cache and the hub cannot"),
        (OfflineModeIsEnabled("no"), r"not in the cache"),
        (ConnectionError("no"), r"not in the cache"),
        (IncompleteSnapshotError("no", "/cache"), r"cached copy of baidu/.* is incomplete"),
    ],
)
def test_out_of_reach(hub: Callable[..., Hub], error: Exception, message: str) -> None:
    hub(error=error)
    with pytest.raises(ModelUnavailable, match=message) as caught:
        locate(MODEL, revision="v2")
    assert caught.value.__cause__ is error


def test_offline_and_not_cached_with_the_real_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match="not in the cache and the hub cannot be reached"):
        locate(MODEL, cache_dir=tmp_path)


def test_offline_and_cached_with_the_real_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--baidu--ERNIE-4.5-21B-A3B-PT"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    expected = Located(snapshot, MODEL, COMMIT)
    assert locate(MODEL, cache_dir=tmp_path) == expected
    assert locate(MODEL, cache_dir=tmp_path, revision=COMMIT) == expected


def test_a_repository_without_config(hub: Callable[..., Hub]) -> None:
    hub(config=False)
    with pytest.raises(ModelUnavailable, match=r"has no config.json: it is not a checkpoint"):
        locate(MODEL)


@pytest.mark.parametrize("source", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", Path("a/b")])
def test_a_missing_folder_is_not_looked_for_on_the_hub(
    hub: Callable[..., Hub], source: str | Path
) -> None:
    stand_in = hub()
    with pytest.raises(ModelUnavailable, match=r"folder .* does not exist"):
        locate(source)
    assert stand_in.calls == []


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"has no config.json; give the folder"):
        locate(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelUnavailable, match="is a file; give the folder"):
        locate(tmp_path / "config.json")
    with pytest.raises(ModelUnavailable, match="has no revision 'v2'"):
        locate(tmp_path, revision="v2")
