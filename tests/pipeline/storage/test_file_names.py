"""No name in a document leads outside of its dataset."""

import pytest

from pipeline import storage

_OUTSIDE = ["../x", "../../x", "../../v1/x", "../../../x/v1/shards/a", "../../v1/../../x/a/b", "a/../../x", "..",
            "a/..", "", "a\0b"]
_WHOLE = ["/etc/passwd", "s3://other/a", "file:///etc/passwd", "memory://a"]


@pytest.mark.parametrize("name", [*_OUTSIDE, *_WHOLE])
def test_names_outside_the_folder_are_refused(name: str) -> None:
    with pytest.raises(storage.DamagedFile, match="does not lie below /r/datasets/art/v2/shards\nhint: "):
        storage.file_below("/r/datasets/art/v2/shards", name)
    assert not storage.is_file_name(name) and not storage.is_path_below(name)


@pytest.mark.parametrize("name", _OUTSIDE)
def test_files_of_a_manifest_lie_in_its_dataset(name: str) -> None:
    with pytest.raises(storage.DamagedFile, match="does not lie below"):
        storage.manifest_file_url("/r/datasets/art/v2/shards", name)


@pytest.mark.parametrize(("name", "url"), [
    ("a.tar", "/r/datasets/art/v2/shards/a.tar"), ("ledger/..a", "/r/datasets/art/v2/shards/ledger/..a"),
    ("../../v1/shards/a.tar", "/r/datasets/art/v1/shards/a.tar"), ("s3://b/a.tar", "s3://b/a.tar")])
def test_files_of_a_manifest_have_safe_names(name: str, url: str) -> None:
    assert storage.manifest_file_url("/r/datasets/art/v2/shards/", name) == url
