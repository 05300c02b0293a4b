"""Signed publications: what an attacker can do who writes to the root but has no key."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import main
from jobs.publishing.check_published import check_published
from jobs.publishing.rebuild import run_rebuild
from pipeline import storage
from pipeline.datasets.pointer import DamagedPointer
from pipeline.embeddings.embed import dataset_encoder
from pipeline.releases import published, signatures
from pipeline.releases.signatures import RELEASE_KEY
from pipeline.stages.driver import run_stage
from pipeline.takedowns import hidden_rows
from tests.jobs.publishing.published_art import NAME, pointer, published_dataset, rebuild
from tests.jobs.publishing.signing.signed_roots import forge, history, refuses, signing_rebuild


def test_a_signed_version_is_read_and_verified(signed: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = published_dataset(signed / "root")
    assert dataset.version == "v2" and dataset_encoder(dataset)
    root = str(signed / "root")
    assert published.open_dataset(root, f"{NAME}@v1").trusted
    assert main(["verify", "--key", str(keys / "publisher.pub.pem"), "--root", root]) == 0
    assert main(["verify", f"--key={(keys / 'other.pub.pem').read_text()}", "--quick", "--root", root]) == 1
    assert "is signed by another key" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is signed by another key"):
        published.open_dataset(root, NAME, keys=signatures.parse_release_keys(str(keys / "other.pub.pem"), "key"))


def test_the_key_and_its_path_are_nowhere_in_the_root(signed: Path, keys: Path) -> None:
    secrets = [line for line in (keys / "publisher.pem").read_bytes().splitlines() if b"--" not in line]
    secrets += [str(keys).encode()]
    files = [path for path in (signed / "root").rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files for secret in secrets if secret in path.read_bytes()]


@pytest.mark.parametrize("change", [{"version": "v1"}, {"number": 7}, {"sequence": 3}, {"release": "0" * 64},
                                    {"previous": None}, {"rolled_back": "v1"}, {"samples": 1}])
def test_every_field_of_a_publication_is_covered(signed: Path, change: dict[str, Any]) -> None:
    forge(signed, json.loads(pointer(signed).read_bytes()) | change)
    refuses(signed, "that is not valid for what it says")


@pytest.mark.parametrize("signature", [None, "text", {}, {"key": 1, "ed25519": 2}, {"key": "SHA256:x", "ed25519": ""}])
def test_a_malformed_signature_is_refused(signed: Path, signature: Any) -> None:
    forge(signed, json.loads(pointer(signed).read_bytes()) | {"signature": signature})
    refuses(signed, "is signed by another key")


def test_a_signature_without_its_value_is_refused(signed: Path) -> None:
    document = json.loads(pointer(signed).read_bytes())
    for value in (None, 3, "", "#", "AAAA"):
        forge(signed, document | {"signature": {"key": document["signature"]["key"], "ed25519": value}})
        refuses(signed, "that is not valid for what it says")


def test_a_removed_signature_is_refused(signed: Path) -> None:
    document = json.loads(pointer(signed).read_bytes())
    del document["signature"]
    forge(signed, document)
    refuses(signed, "has no signature")


def test_a_version_of_an_attacker_with_another_key_is_refused(signed: Path, keys: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RELEASE_KEY)
    document = json.loads(pointer(signed).read_bytes())
    forge(signed, signatures.publishing_keys(str(keys / "other.pem")).sign(NAME, document | {"sequence": 3}))
    monkeypatch.setenv(RELEASE_KEY, str(keys / "publisher.pub.pem"))
    refuses(signed, "is signed by another key")


def test_an_older_release_under_a_newer_number_is_refused(signed: Path) -> None:
    older = json.loads(history(signed, 1).read_bytes())
    forge(signed, older | {"sequence": 3})
    refuses(signed, "that is not valid for what it says")


def test_a_replayed_older_pointer_is_refused_after_the_newer_was_seen(signed: Path) -> None:
    assert published_dataset(signed / "root").version == "v2"
    older = history(signed, 1).read_bytes()
    history(signed, 2).unlink()
    history(signed, 1).write_bytes(older + b"\n")  # another first publication, so that this looks like another root
    pointer(signed).write_bytes(older)
    refuses(signed, "it has number 1, and this machine has seen 2")


def test_repair_does_not_sign_an_older_publication_after_the_newer_was_seen(
        signed: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(signed / "root")
    assert published_dataset(root).version == "v2"
    history(signed, 2).unlink()
    older = history(signed, 1).read_bytes()
    pointer(signed).write_bytes(older)
    for verb in (["neighbors", NAME, "--local"], ["verify", "--quick"]):
        assert main([*verb, "--root", root]) == 1
        assert re.search(rf"hint: python -m jobs repair {NAME} --sign KEYFILE --root", capsys.readouterr().err), verb
    repairing = ["repair", NAME, "--root", root, "--sign", str(keys / "publisher.pem")]
    for more in (["--dry-run"], []):
        assert main([*repairing, *more]) == 1
        error = capsys.readouterr().err
        assert "publications 2 to 2 of drawn are lost: this machine has seen 2" in error
        assert f"--sign {repairing[-1]} --accept-lost-publications" in error and pointer(signed).read_bytes() == older
    assert main([*repairing, "--accept-lost-publications"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["published"] == "v1" and report["accepted_lost_publications"] == [2]
    assert published_dataset(root).version == "v1" and main(["verify", "--quick", "--root", root]) == 0


@pytest.mark.parametrize("signer", ["other", ""])
def test_repair_signs_no_version_of_an_attacker(signer: str, signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    root = str(signed / "root")
    assert published_dataset(root).version == "v2"  # this machine sees publication 2
    shutil.rmtree(signed / "root/datasets")
    shutil.rmtree(signed / "root/published")
    with monkeypatch.context() as attacker:
        attacker.delenv(RELEASE_KEY)
        attacker.setenv("RDM_CACHE", str(signed / "attacker"))
        if signer:
            run_rebuild(signing_rebuild(signed, keys / f"{signer}.pem"), run_stage)
        else:
            rebuild(root, signed / "source")
    data = pointer(signed).read_bytes()
    repairing = ["repair", NAME, "--root", root, "--sign", str(keys / "publisher.pem"), "--accept-unsigned"]
    assert main(repairing) == (2 if signer else 1)
    error = capsys.readouterr().err
    assert pointer(signed).read_bytes() == data
    if signer:
        assert "has no readable publication with an accepted signature" in error
        assert main([*repairing, "--accept-lost-publications"]) == 2 and pointer(signed).read_bytes() == data
    else:
        assert "publications 1 to 2 of drawn are lost: this machine has seen 2" in error
        assert "--accept-unsigned --accept-lost-publications" in error
        assert main([*repairing, "--accept-lost-publications"]) == 0
        assert json.loads(capsys.readouterr().out)["accepted_lost_publications"] == [1, 2]


def test_a_signed_pointer_of_another_dataset_is_refused(signed: Path) -> None:
    root = signed / "root"
    shutil.copytree(root / "datasets" / NAME, root / "datasets" / "other")
    shutil.copytree(root / "published" / NAME, root / "published" / "other")
    with pytest.raises(DamagedPointer, match="that is not valid for what it says"):
        published.open_dataset(str(root), "other")


def test_changed_files_below_the_pointer_are_refused(signed: Path) -> None:
    version = pointer(signed).parent / "v2"
    release = version / "release.json"
    before = release.read_bytes()
    release.write_bytes(before.replace(b'"samples"', b'"Samples"'))
    refuses(signed, "is not the one that was published")
    release.write_bytes(before)
    # A careful attacker makes the manifest, the release and the pointer agree.
    manifest = version / "embeddings" / "manifest.json"
    data = manifest.read_bytes()
    document = json.loads(data)
    manifest.write_bytes(storage.json_bytes(document | {"content": "0" * 64}))
    with pytest.raises(ValueError, match="is not the one that was published"):
        published_dataset(signed / "root").manifest("embeddings")
    about = json.loads(before)
    about["manifests"]["embeddings"] = hashlib.sha256(manifest.read_bytes()).hexdigest()
    release.write_bytes(storage.json_bytes(about))
    forge(signed, json.loads(pointer(signed).read_bytes()) | {
        "release": hashlib.sha256(release.read_bytes()).hexdigest()})
    refuses(signed, "that is not valid for what it says")


def test_a_changed_file_is_found(signed: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = next((pointer(signed).parent / "v2" / "embeddings").glob("*.npy"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["verify", "--key", str(keys / "publisher.pub.pem"), "--root", str(signed / "root")]) == 1
    assert file.name in capsys.readouterr().out


def test_a_stage_that_was_added_to_a_release_is_refused(signed: Path) -> None:
    dataset = published_dataset(signed / "root")
    assert "tombstones" not in dict(dataset.trusted)
    shutil.copytree(dataset.folder("embeddings"), dataset.folder("tombstones"))
    with pytest.raises(ValueError, match="is not part of the signed release"):
        hidden_rows.read_hidden_rows(published_dataset(signed / "root"))
    faults = check_published(str(signed / "root"))[1]
    assert any("is not part of the signed release" in fault["fault"] for fault in faults)


def test_a_dataset_that_lost_pointer_and_history_is_refused(signed: Path, keys: Path) -> None:
    pointer(signed).unlink()
    refuses(signed, "is missing, and 2 publications are in the history")
    shutil.rmtree(signed / "root" / "published")
    (pointer(signed).parent / "v1" / "release.json").write_text("{")
    refuses(signed, "is missing, and v2 was built on a published version")
    (pointer(signed).parent / "v2" / "release.json").unlink()
    refuses(signed, "was never published, and RDM_RELEASE_KEY or --key accepts only signed")
    for release in pointer(signed).parent.glob("*/release.json"):
        release.unlink()
    with pytest.raises(ValueError, match="was never published, and RDM_RELEASE_KEY or --key accepts only signed"):
        published_dataset(signed / "root")
    arguments = ["--key", str(keys / "publisher.pub.pem"), "--root", str(signed / "root")]
    assert main(["verify", "--only", f"datasets/{NAME}", *arguments]) == 2  # nothing is signed


def test_a_named_version_needs_a_signed_publication(signed: Path) -> None:
    root = str(signed / "root")
    document = json.loads(history(signed, 1).read_bytes())
    assert published.open_dataset(root, NAME, f"{NAME}@v1").version == "v1"  # as a run that is continued
    history(signed, 1).write_bytes(storage.json_bytes(document | {"release": "0" * 64}))
    for text, pinned in ((f"{NAME}@v1", ""), (NAME, f"{NAME}@v1")):
        with pytest.raises(ValueError, match=r"drawn@v1 has a signature .* not valid"):
            published.open_dataset(root, text, pinned)
    with pytest.raises(ValueError, match="drawn@v7 was never published, and RDM_RELEASE_KEY"):
        published.open_dataset(root, f"{NAME}@v7")


def test_a_stage_is_not_added_to_a_signed_version(signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    root = signed / "root"
    monkeypatch.delenv(RELEASE_KEY)  # also where no reader checks signatures
    assert main(["embed", f"{NAME}@v2", "--captions", "--local", "--root", str(root)]) == 2
    said = capsys.readouterr()
    assert "--embed-captions --sign KEYFILE" in said.err and not said.out  # before any stage runs
    assert not (root / f"datasets/{NAME}/v2/text_embeddings").exists()


@pytest.mark.parametrize("stage", ["tombstones", "text_embeddings"])
def test_a_rebuild_replaces_a_signed_version_with_an_added_stage(signed: Path, keys: Path, stage: str) -> None:
    folder = Path(published_dataset(signed / "root").folder("embeddings"))
    shutil.copytree(folder, folder.parent / stage)
    assert run_rebuild(signing_rebuild(signed, keys / "publisher.pem"), run_stage)["published"] == "v3"
    assert published_dataset(signed / "root").version == "v3"
