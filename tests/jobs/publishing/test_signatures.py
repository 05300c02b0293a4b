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
from jobs.publishing.rebuild import Rebuild, run_rebuild
from jobs.publishing.releases import rollback
from jobs.publishing.repair import repair
from jobs.sampling.mixture import Mixture
from pipeline import storage
from pipeline.datasets import hidden_rows, published, signatures, version_marks
from pipeline.datasets.pointer import DamagedPointer
from pipeline.datasets.published import Published
from pipeline.datasets.signatures import RELEASE_KEY
from pipeline.embeddings.embed import dataset_encoder
from pipeline.stages.driver import run_stage
from pipeline.stages.types import StageFailed
from tests.jobs.publishing.key_files import openssl_key
from tests.jobs.publishing.published_art import NAME, make_rebuild, paint, pointer, published_dataset, rebuild


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the publisher's key, and another one."""
    folder = tmp_path_factory.mktemp("keys")
    openssl_key(folder, "publisher")
    openssl_key(folder, "other")
    return folder


def signing_rebuild(place: Path, private: Path, **options: bool) -> Rebuild:
    plain = make_rebuild(place / "root", place / "source")
    return Rebuild(plain.root, plain.name, plain.shard, plain.embed, plain.index, plain.config,
                   signatures.publishing_keys(str(private), **options))


@pytest.fixture(scope="session")
def signed_once(first: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed v1 and a signed v2."""
    place = tmp_path_factory.mktemp("signed") / "place"
    shutil.copytree(first, place)
    shutil.rmtree(place / "root")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(RELEASE_KEY, raising=False)
        private = keys / "publisher.pem"
        assert run_rebuild(signing_rebuild(place, private), run_stage)["published"] == "v1"
        paint(place / "source" / "added.png", 1)
        assert run_rebuild(signing_rebuild(place, private), run_stage)["published"] == "v2"
    return place


@pytest.fixture
def signed(signed_once: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy for one test, whose readers have the publisher's public key."""
    shutil.copytree(signed_once, tmp_path / "place")
    monkeypatch.setenv(RELEASE_KEY, str(keys / "publisher.pub.pem"))
    monkeypatch.setenv("RDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "place"


def history(place: Path, sequence: int) -> Path:
    return place / "root" / "published" / NAME / f"{sequence:06d}.json"


def forge(place: Path, document: dict[str, Any]) -> None:
    """Put a pointer in place, and into the history, as an attacker would who knows all but the key."""
    pointer(place).write_bytes(storage.json_bytes(document))
    history(place, document["sequence"]).write_bytes(storage.json_bytes(document))


def refuses(place: Path, reason: str) -> None:
    """Every reader and every check refuses the dataset for this reason."""
    with pytest.raises(ValueError, match=reason):
        published_dataset(place / "root")
    faults = check_published(str(place / "root"))[1]
    assert any(reason in fault["fault"] for fault in faults), faults


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
        assert re.search(rf"hint: python -m jobs repair .*{NAME}.* --sign KEYFILE\n", capsys.readouterr().err), verb
    repairing = ["repair", NAME, "--root", root, "--sign", str(keys / "publisher.pem")]
    for more in (["--dry-run"], []):
        assert main([*repairing, *more]) == 1
        error = capsys.readouterr().err
        assert "publications 2 to 2 of drawn are lost: this machine has seen 2" in error
        assert "--sign KEYFILE --accept-lost-publications" in error and pointer(signed).read_bytes() == older
    assert main([*repairing, "--accept-lost-publications"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["published"] == "v1" and report["accepted_lost_publications"] == [2]
    assert published_dataset(root).version == "v1" and main(["verify", "--quick", "--root", root]) == 0


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


def test_unsigned_versions_are_refused_if_a_key_is_set(place: Path, keys: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(RELEASE_KEY, str(keys / "publisher.pub.pem"))
    refuses(place, "has no signature")
    with pytest.raises(DamagedPointer, match="has no signature"):
        Mixture.parse(str(place / "root"), f"{NAME}:2")  # as `sample --database`
    for verb in (["neighbors", NAME, "--local"], ["neighbors", f"{NAME}@v1", "--local"], ["latents", NAME, "--local"],
                 ["train", "run", "--dataset", NAME, "--local"], ["versions", NAME]):
        assert main([*verb, "--root", str(place / "root")]) == 1, verb
        assert "has no signature" in capsys.readouterr().err, verb


def test_the_hint_signs_an_unsigned_dataset(place: Path, keys: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    root, sign = str(place / "root"), ["--sign", str(keys / "publisher.pem")]
    hint = f"hint: python -m jobs repair {NAME} --root {root} --sign KEYFILE --accept-unsigned"
    rebuild_source = ["rebuild", NAME, "--source", str(place / "source"), "--local", *sign]
    for verb in (rebuild_source, ["rollback", NAME, *sign], ["repair", NAME, *sign]):
        assert main([*verb, "--root", root]) == (2 if verb[0] == "repair" else 1)
        assert hint in capsys.readouterr().err, verb
    monkeypatch.setenv(RELEASE_KEY, str(keys / "publisher.pub.pem"))
    assert main(["neighbors", NAME, "--local", "--root", root]) == 1 and hint in capsys.readouterr().err
    assert main(["repair", NAME, "--root", root, *sign, "--accept-unsigned"]) == 0
    assert published_dataset(root).version == "v1"
    document = json.loads(pointer(place).read_bytes())
    del document["signature"]
    forge(place, document | {"sequence": 99})
    with pytest.raises(DamagedPointer, match=r"--sign KEYFILE$"):  # never sign what an attacker wrote
        published_dataset(root)


def test_publishing_a_signed_dataset_needs_the_key(signed: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    root = str(signed / "root")
    paint(signed / "source" / "more.png", 2)
    before = pointer(signed).read_bytes()
    verbs = (["rebuild", NAME, "--source", str(signed / "source"), "--local"], ["rollback", NAME])
    for value in ("set", ""):
        if not value:
            monkeypatch.delenv(RELEASE_KEY)
        for verb in verbs:
            assert main([*verb, "--root", root]) == 2
            assert "hint: --sign KEYFILE; or --unsigned" in capsys.readouterr().err
    pointer(signed).unlink()
    assert main(["repair", NAME, "--root", root]) == 2
    assert "hint: --sign KEYFILE; or --unsigned" in capsys.readouterr().err
    pointer(signed).write_bytes(before)
    assert main(["rollback", NAME, "--unsigned", "--root", root]) == 0
    assert "signature" not in json.loads(pointer(signed).read_bytes())
    assert published_dataset(root).version == "v1"  # readers without a key


def test_the_command_line_signs_a_rebuild(signed: Path, keys: Path, capsys: pytest.CaptureFixture[str],
                                          caplog: pytest.LogCaptureFixture) -> None:
    paint(signed / "source" / "more.png", 2)
    arguments = ["rebuild", NAME, "--source", str(signed / "source"), "--image-size", "32", "--format", "png",
                 "--samples-per-shard", "30", "--root", str(signed / "root"), "--local"]
    assert main([*arguments, "--dry-run"]) == 0  # which needs no key
    assert main([*arguments, "--sign", str(keys / "publisher.pem")]) == 0
    assert published_dataset(signed / "root").version == "v3"
    output = capsys.readouterr()
    assert str(keys) not in output.out + output.err + caplog.text
    assert Mixture.parse(str(signed / "root"), f"{NAME}:2").members[0].signed


def test_rollback_and_repair_sign(signed: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, sign = str(signed / "root"), ["--sign", str(keys / "publisher.pem")]
    assert main(["rollback", NAME, *sign, "--root", root]) == 0
    assert published_dataset(root).version == "v1"
    pointer(signed).write_text("{")
    assert main(["repair", NAME, *sign, "--dry-run", "--root", root]) == 0
    assert main(["repair", NAME, *sign, "--root", root]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pointer"] == "restored"
    assert published_dataset(root).version == "v1" and Published.load(root, NAME).document["sequence"] == 4
    assert repair(root, NAME)["pointer"] == "in order"  # which needs no key


def test_repair_restores_only_signed_versions(signed: Path, keys: Path) -> None:
    root = str(signed / "root")
    document = json.loads(pointer(signed).read_bytes())
    del document["signature"]
    forge(signed, document | {"sequence": 99, "version": "v1", "release": "0" * 64})
    refuses(signed, "has no signature")
    assert repair(root, NAME, keys=signatures.publishing_keys(str(keys / "publisher.pem")))["published"] == "v2"
    after = Published.load(root, NAME)
    assert after.version == "v2" and after.document["sequence"] == 100
    shutil.rmtree(signed / "root" / "published")
    pointer(signed).write_text("{")
    with pytest.raises(ValueError, match="no readable publication with an accepted signature"):
        repair(root, NAME, keys=signatures.publishing_keys(str(keys / "publisher.pem")))


def test_rollback_goes_to_signed_versions_only(signed: Path, keys: Path) -> None:
    root, publisher = str(signed / "root"), signatures.publishing_keys(str(keys / "publisher.pem"))
    document = json.loads(history(signed, 1).read_bytes())
    release = pointer(signed).parent / "v1" / "release.json"
    release.write_bytes(release.read_bytes() + b"\n")
    history(signed, 1).write_bytes(storage.json_bytes(
        document | {"release": hashlib.sha256(release.read_bytes()).hexdigest()}))
    with pytest.raises(ValueError, match="v1 was never published with an accepted signature"):
        rollback(root, NAME, "v1", keys=publisher)
    history(signed, 1).write_bytes(storage.json_bytes(document))
    with pytest.raises(ValueError, match="the release of drawn@v1 is not the one"):
        rollback(root, NAME, "", keys=publisher)


def test_a_signed_rebuild_reuses_no_unsigned_version(signed: Path, keys: Path) -> None:
    document = json.loads(pointer(signed).read_bytes())
    del document["signature"]
    forge(signed, document)
    paint(signed / "source" / "more.png", 2)
    with pytest.raises(DamagedPointer, match="has no signature"):
        signing_rebuild(signed, keys / "publisher.pem")


def test_a_dataset_can_become_signed_and_change_its_key(place: Path, keys: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RELEASE_KEY, raising=False)
    private = keys / "publisher.pem"
    with pytest.raises(DamagedPointer, match="has no signature"):
        signing_rebuild(place, private)
    assert run_rebuild(signing_rebuild(place, private, accept_unsigned=True), run_stage)["unchanged"]
    text = (keys / "publisher.pub.pem").read_text()
    monkeypatch.setenv(RELEASE_KEY, text)
    assert published_dataset(place / "root").version == "v1"
    before = pointer(place).read_bytes()
    assert run_rebuild(signing_rebuild(place, private), run_stage)["unchanged"]  # signed already
    assert json.loads(before)["sequence"] == json.loads(pointer(place).read_bytes())["sequence"] == 2
    with pytest.raises(ValueError, match=r"the key of --sign is SHA256:.*, which RDM_RELEASE_KEY does not name"):
        signing_rebuild(place, keys / "other.pem")
    monkeypatch.setenv(RELEASE_KEY, text + (keys / "other.pub.pem").read_text())  # both for a while
    assert repair(str(place / "root"), NAME, keys=signatures.publishing_keys(str(keys / "other.pem")))[
        "pointer"] == "signed"
    monkeypatch.setenv(RELEASE_KEY, (keys / "other.pub.pem").read_text())
    assert published_dataset(place / "root").version == "v1"
    monkeypatch.setenv(RELEASE_KEY, text)
    refuses(place, "is signed by another key")


def test_a_version_removed_by_gc_leaves_a_signed_pointer(signed: Path, keys: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version_marks, "is_removing", lambda dataset: dataset.version == "v3")
    paint(signed / "source" / "more.png", 2)
    update = signing_rebuild(signed, keys / "publisher.pem")
    monkeypatch.setattr(update, "_is_gone", lambda version: False)
    dataset, _ = update.claim()
    with pytest.raises(StageFailed, match="was removed while it was published"):
        update.build(dataset, update.compare(dataset, run_stage), run_stage)
        update.publish(dataset)
    after = Published.load(str(signed / "root"), NAME)
    assert after.version == "v2" and after.document["sequence"] == 4


def test_a_request_to_forget_needs_no_key(signed: Path) -> None:
    root = str(signed / "root")
    name = next((signed / "source").rglob("*.png")).relative_to(signed / "source")
    assert main(["forget", "--url", str(name), "--root", root]) == 0
    current = Published.load(root, NAME)
    assert current.version == "v2" and current.document["takedowns"] == 1
    assert len(hidden_rows.read_hidden_rows(published_dataset(root))) == 1


def test_a_new_root_at_the_same_place_continues_the_numbers(signed: Path, keys: Path) -> None:
    assert published_dataset(signed / "root").version == "v2"
    shutil.rmtree(signed / "root")
    assert run_rebuild(signing_rebuild(signed, keys / "publisher.pem"), run_stage)["published"] == "v1"
    assert Published.load(str(signed / "root"), NAME).document["sequence"] == 3
    assert published_dataset(signed / "root").version == "v1"


def test_rebuild_without_a_key_works_as_before(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RELEASE_KEY, raising=False)
    paint(place / "source" / "added.png", 1)
    assert rebuild(place / "root", place / "source")["published"] == "v2"
    assert "signature" not in json.loads(pointer(place).read_bytes())
