"""Publishing a signed dataset: rebuild, rollback, repair, gc, and another key."""

import hashlib
import json
import shlex
import shutil
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.publishing.rebuild import run_rebuild
from jobs.publishing.releases import rollback
from jobs.publishing.repair import repair
from jobs.sampling.mixture import Mixture
from jobs.telemetry.output import fit_commands
from pipeline import storage
from pipeline.datasets.pointer import DamagedPointer
from pipeline.releases import signatures, version_marks
from pipeline.releases.published import Published
from pipeline.releases.signatures import RELEASE_KEY
from pipeline.stages.driver import run_stage
from pipeline.stages.types import StageFailed
from pipeline.takedowns import hidden_rows
from tests.jobs.publishing.published_art import NAME, paint, pointer, published_dataset, rebuild
from tests.jobs.publishing.signing.signed_roots import forge, history, refuses, signing_rebuild


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
    hint = f"hint: python -m jobs repair {NAME} --sign {sign[1]} --accept-unsigned --root {root}"
    rebuild_source = ["rebuild", NAME, "--source", str(place / "source"), "--local", *sign]
    for verb in (rebuild_source, ["rollback", NAME, *sign], ["repair", NAME, *sign]):
        assert main([*verb, "--root", root]) == (2 if verb[0] == "repair" else 1)
        assert hint in capsys.readouterr().err, verb
    monkeypatch.setenv(RELEASE_KEY, str(keys / "publisher.pub.pem"))
    assert main(["neighbors", NAME, "--local", "--root", root]) == 1
    assert hint.replace(sign[1], "KEYFILE") in capsys.readouterr().err  # this command names no key
    assert main(["repair", NAME, "--root", root, *sign, "--accept-unsigned"]) == 0
    assert published_dataset(root).version == "v1"
    document = json.loads(pointer(place).read_bytes())
    del document["signature"]
    forge(place, document | {"sequence": 99})
    with pytest.raises(DamagedPointer, match=r"--sign KEYFILE$"):  # never sign what an attacker wrote
        published_dataset(root)


def test_hints_of_a_signed_dataset_name_the_key(signed: Path, keys: Path, caplog: pytest.LogCaptureFixture,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    root = str(signed / "root")
    assert main(["rollback", NAME, "--sign", str(keys / "publisher.pem"), "--root", root]) == 0
    _, _, undo = fit_commands(caplog.messages[-1]).partition("hint: to undo this: python -m jobs ")
    assert main(shlex.split(undo)) == 0  # literally
    assert published_dataset(root).version == "v2"
    assert main(["forget", "--url", "added.png", "--root", root]) == 0
    assert f"python -m jobs rebuild {NAME} --source SOURCE --sign KEYFILE --root" in capsys.readouterr().out
    assert main(["rm", NAME, "--root", root]) == 2
    assert f"python -m jobs rm {NAME} --published --sign KEYFILE --root" in capsys.readouterr().err


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


def test_rollback_after_a_change_of_keys_names_the_versions_with_the_old_key(
        signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, texts = str(signed / "root"), [(keys / f"{name}.pub.pem").read_text() for name in ("publisher", "other")]
    monkeypatch.setenv(RELEASE_KEY, "".join(texts))
    repair(root, NAME, keys=signatures.publishing_keys(str(keys / "other.pem")))
    monkeypatch.setenv(RELEASE_KEY, texts[1])
    with pytest.raises(ValueError, match="no accepted key has signed v1 of drawn"):
        rollback(root, NAME, "", keys=signatures.publishing_keys(str(keys / "other.pem")))


def test_rollback_to_a_version_from_before_signing_names_the_flag(place: Path, keys: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    root, private = str(place / "root"), keys / "publisher.pem"
    paint(place / "source" / "more.png", 2)
    assert run_rebuild(signing_rebuild(place, private, accept_unsigned=True), run_stage)["published"] == "v2"
    rollback_v2 = ["rollback", NAME, "--sign", str(private), "--root", root]
    assert main(rollback_v2) == 2
    said = capsys.readouterr().err
    assert f"v1 of {NAME} has no signature" in said and said.count("hint: ") == 1
    hinted = shlex.split(said.partition("hint: python -m jobs ")[2])
    assert "--accept-unsigned" in hinted and main(hinted) == 0
    assert Published.load(root, NAME).version == "v1"


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
