import io
import tarfile

import pytest
from webdataset.tariterators import base_plus_ext

from pipeline.media import tars
from pipeline.media.sample_names import KEY_AND_SUFFIX


def _tar(path, members, tar_format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            if data is None:
                member = tarfile.TarInfo(name)
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


MEMBERS = [("__meta__/0.json", b"{}"), ("a/", None), ("a/0.json", b"{}"), ("a/0.JPG", b"first"), ("a/0.txt", b""),
           ("1.png", b""), (f"{'long/' * 25}2.webp", b"x" * 513), ("b/żółć 3.tar.png", b"4"),
           ("b/żółć 3.png", b"y" * 512), (f"{'z' * 96}.jpg", b"last")]


@pytest.mark.parametrize("name", ["0.jpg", "a/0.JPG", "a.b/0.jpg", "a/0.tar.png", "a/.hidden.jpg", "none", "a/none",
                                  "0.", ".jpg", "a/", "a.b/none", "x\n.jpg", "żółć.png", ""])
def test_names_are_split_as_in_webdataset(name):
    parts = KEY_AND_SUFFIX.match(name)
    assert (parts.groups() if parts else (None, None)) == base_plus_ext(name)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_by_position_are_those_read_in_order(tmp_path, tar_format):
    path = _tar(tmp_path / "some.tar", MEMBERS, tar_format)
    expected = [tars.sample_image(sample) for sample in tars.read(path)]
    pictures = tars.TarImages(path)
    assert len(pictures) == len(expected) == 5
    path.unlink()  # the end of an open range
    assert [pictures[position] for position in range(5)] == expected
    assert pictures[4] == b"last" and pictures[0] == b"first"


def test_images_of_a_written_tar_are_read_back(tmp_path):
    samples = [{"__key__": f"{number:06d}", "jpg": bytes([number]) * 700 * number, "json": b"{}", "txt": b"a word"}
               for number in range(40)]
    tars.write(tmp_path / "some.tar", samples)
    pictures = tars.TarImages(tmp_path / "some.tar")
    assert [pictures[position] for position in range(len(pictures))] == [sample["jpg"] for sample in samples]


def test_an_empty_tar_has_no_images(tmp_path):
    tars.write(tmp_path / "some.tar", [])
    assert len(tars.TarImages(tmp_path / "some.tar")) == 0


def test_invalid_samples_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"sample 0 has no image"):
        tars.TarImages(_tar(tmp_path / "none.tar", [("0.txt", b"a word"), ("1.png", b"1")]))
    with pytest.raises(ValueError, match=r"twice\.tar has 0\.PNG twice\nhint"):
        tars.TarImages(_tar(tmp_path / "twice.tar", [("0.png", b"1"), ("0.PNG", b"1")]))


def test_a_cut_tar_has_fewer_samples_or_is_an_error(tmp_path):
    path = _tar(tmp_path / "some.tar", [(f"{number}.png", bytes([number]) * 1000) for number in range(4)])
    whole = path.read_bytes()
    path.write_bytes(whole[:2 * 1536])
    assert len(tars.TarImages(path)) == 2
    path.write_bytes(whole[:2 * 1536 + 600])
    pictures = tars.TarImages(path)
    assert len(pictures) == 3 and pictures[1] == bytes([1]) * 1000
    with pytest.raises(ValueError, match=r"some\.tar is cut in the middle of sample 2\nhint"):
        pictures[2]
    path.write_bytes(whole[:1536 + 100] + b"#" + whole[1536 + 101:])  # a damaged header
    assert len(tars.TarImages(path)) == 1
