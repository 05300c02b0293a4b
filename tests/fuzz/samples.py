"""Undamaged files of each format, and known damaged ones."""

import bz2
import gzip
import io
import json
import struct
import tarfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

from model import recipes
from model.config import to_dict
from model.network.unet import UNet
from pipeline.stages import records

DEEP = b"[" * 100_000
DEEP_OBJECT = b'{"a":' * 100_000
LONG_NUMBER = b"9" * 5000


@dataclass(frozen=True)
class Format:
    """A format: the name of its file, undamaged files, and the readers that must survive damaged ones."""

    name: str
    whole: tuple[bytes, ...]
    readers: tuple[str, ...]
    damaged: tuple[bytes, ...] = ()
    companions: tuple[str, ...] = ()
    """Whole files that the readers need with it."""


def _parquet(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def _npy(array: np.ndarray, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


def _npy_header(text: str, data: bytes = b"") -> bytes:
    header = text.encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def _npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _tar(members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _index(key: str) -> bytes:
    index = faiss.index_factory(8, key)
    vectors = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    index.train(vectors)
    index.add(vectors)
    return faiss.serialize_index(index).tobytes()


def _torch(document: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(document, buffer)
    return buffer.getvalue()


def _safetensors(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


_LINES = b'{"url": "http://a/1.jpg", "caption": "one", "width": 5}\n{"url": "http://a/2.jpg", "width": null}\n'
_CSV = b"url,caption,width\nhttp://a/1.jpg,one,5\nhttp://a/2.jpg,two,2\n"
_TABLE = pa.table({"url": ["http://a/1.jpg", "http://a/2.jpg", None], "caption": ["one", None, "three"],
                   "width": [5, 6, None], "more": [[1.0], [], None], "place": [{"a": 1}, {"a": None}, None]})
_PICTURES = pa.table({"image": pa.array([b"abc", b"", None], pa.binary()), "caption": ["one", "two", None],
                      "width": [1, 2, 3]})
_FILE = {"name": "000000.tar", "bytes": 10, "sha256": "0" * 64}
_RECORD = {"id": "000000", "plan": "0" * 64, "samples": 2, "files": [_FILE], "skipped": {"broken": 1}, "noted": {},
           "info": {"a": 1}, "run": {"seconds": 1.0, "device": "cpu, fp32", "times": {}}}
_PLAN = {"format": 2, "stage": "shard", "fingerprint": "0" * 64, "section": {"a": 1}, "inputs": {
    "source": {"path": "", "digest": "0" * 64}, "other": {"path": "datasets/y/v1/shards", "digest": "1" * 64}},
    "items": [{"id": "000000", "inputs": {"count": 3}}], "code": "x"}
_MANIFEST = {key: _PLAN[key] for key in ("format", "stage", "fingerprint", "section", "inputs")} | {
    "items": [_RECORD], "files": [_FILE], "info": {}, "content": "2" * 64,
    "totals": {"items": 1, "samples": 2, "bytes": 10, "skipped": {"broken": 1}, "noted": {}},
    "run": {"sealed": "2026-01-01T00:00:00Z", "code": "x", "seconds": 1.0, "devices": {"cpu, fp32": 1}, "retired": [
        {"host": "a", "node": "b", "card": "", "reason": "c", "items": 1}]}}
_PROGRESS = {"updated": 1.0, "items": 0, "of_items": 1, "rows": 0, "of_rows": 3, "retried": 0, "bytes": 5,
             "rows_per_s": 1.0, "seconds_left": 3.0, "skipped": {"broken": 1}, "failed_items": 0, "retired": [],
             "devices": {"cpu, fp32": 1}}
_REPORT = {"rows": 2, "samples": 1, "bytes": 5, "skipped": {"broken": 1}, "again": False}
_POINTER = {"version": "v1", "number": 1, "sequence": 1, "release": "3" * 64, "published": 1.5, "checked": 2.5,
            "previous": None, "takedowns": 0, "content": "4" * 64, "samples": 2, "recall@10": 0.9}
_RELEASE = {"name": "x", "version": "v1", "manifests": {"shards": "5" * 64}, "content": "4" * 64, "number": 1,
            "samples": 2, "recall@10": None, "base": None, "change": {"added": 2}, "queries": ["a cat"], "code": "x"}
_REQUEST = {"at": "2026-01-01T00:00:00Z", "note": "", "sha256": ["6" * 64], "urls": ["http://a/b"], "domains": ["a"]}
_TAKEDOWNS = _REQUEST | {"requests": [_REQUEST], "applied": 1, "rows": [1, 2], "through": 1}
_RUN = _PLAN | {"stage": "train", "section": {"encoder": {"model": "m", "dim": 4}, "image_size": 16, "dataset": "x",
                                             "train": {}}}
_GOOD = ("good-plan.json", "good-manifest.json")
_STORE: dict[str, Any] = {
    "report": _REPORT, "record": _RECORD, "failure": {"id": "000000", "error": "a", "traceback": "b"},
    "more_items": {"items": _PLAN["items"]}, "pointer": _POINTER, "release": _RELEASE,
    "gates": [{"name": "recall@10", "passed": False, "value": 0.1}],
    "lease": {"host": "h", "machine": "m", "pid": 1, "started": "1", "exclusive": False},
    "mark": {"state": "publishing", "sequence": 1, "token": "a"}, "takedowns": _TAKEDOWNS, "takedown_copy": _REQUEST,
    "fault": {"launch": "", "kind": "ValueError", "message": "a", "at": 1.5}, "run": _RUN}
"""Documents below a root, by their readers."""
_ARCHIVE = {"embedding": np.ones((3, 8), np.float32), "img_id": np.arange(3), "patch_coords": np.ones((3, 4), int)}
_WEIGHTS = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3), "betas": torch.zeros(10)}
_NOT_UTF8 = b'{"url": "http://a/1.jpg"}\n{"url": "\xff\xfe"}\n'
_JSON_DAMAGE = (b"", b"null", b"[]", b"{}", b"1", b'"a"', b"\xff", b"\xef\xbb\xbf{}", b"\x00", DEEP, DEEP_OBJECT,
                b'{"items": ' + LONG_NUMBER + b"}", b'{"a": NaN}', b'{"a": 1e999}')


def _variants(document: Any) -> tuple[bytes, ...]:
    """Copies of the document in which one value has another type or is missing."""
    if isinstance(document, list):
        return tuple(b"[" + variant + b"]" for variant in _variants(document[0]))
    variants = []
    for name in document:
        for value in (None, "x", [], {}, [None], {"a": None}, {"count": 10**30, "file": {}}, "\ud800", float("nan")):
            variants.append(json.dumps(document | {name: value}).encode())
        variants.append(json.dumps({key: value for key, value in document.items() if key != name}).encode())
    return tuple(variants)


@cache
def formats() -> dict[str, Format]:
    """Every format by its name here."""
    lists = ("text_list", "list_source", "filtered_list")
    table, pictures = _parquet(_TABLE), _parquet(_PICTURES)
    keys = _parquet(pa.table({"image_path": ["a/000000.jpg", "000001", "000002"]}))
    packed = records.to_bytes([records.table([_RECORD] * 3)])
    vectors = _npy(np.ones((3, 8), np.float16))
    tar = _tar({"000000.png": b"x" * 700, "000000.json": b'{"url": "u", "width": 4}', "000000.txt": b"caption",
                "b/000001.png": b"y", "b/000001.json": b"{}"})
    pax = _tar({f"{'ä' * 60}.png": b"x", "b.json": b'{"caption": ["a"]}'}, tarfile.PAX_FORMAT)
    tiny = recipes.tiny()
    tiny = replace(tiny, unet=replace(tiny.unet, model_channels=32, channel_mult=(1,), attention_downsampling=(1,)))
    small = UNet(tiny.unet)
    about = {"format": 1, "step": 1, "ema_updates": 0, "config": to_dict(tiny)}
    weights = save({name: tensor.half() for name, tensor in small.state_dict().items()})
    indices = tuple(_index(key) for key in ("Flat", "IVF4,Flat", "OPQ2_4,IVF4,PQ2x4", "IVF4,SQ8"))
    json_members = tuple(_tar({"a.png": b"x", "a.json": data}) for data in (
        DEEP, DEEP_OBJECT, LONG_NUMBER, b'{"width": ' + LONG_NUMBER + b"}", b'{"caption": "\xff"}', b'{"a": "\\ud800"}',
        b'{"caption": {"a": [1]}, "width": 1e999}', b'{"\\ud800": 1}', b'[{"a": 1}]'))
    return {
        "csv": Format("list.csv", (_CSV,), lists, (
            b"", b"url\n", b"\n\n", b"url,url\na,b\n", b"url\n\xff\xfe\n", b"url\n" + b"a" * 300_000 + b"\n",
            b'url\n"a\n', b"url,caption\na\x00b,c\n", b"\xef\xbb\xbfurl\na\n", b"url,,\na,b,c,d\n", b"url\r\ra\rb\r")),
        "tsv": Format("list.tsv", (_CSV.replace(b",", b"\t"),), lists, (b"url\t\xff\n",)),
        "jsonl": Format("list.jsonl", (_LINES,), lists, (
            b"", _NOT_UTF8, DEEP, DEEP_OBJECT, b"{}\n", b'{"url": ' + LONG_NUMBER + b"}\n", b"[]\n", b"null\n",
            b'{"url": "a", "width": ' + LONG_NUMBER + b"}\n", b'{"url": "\\ud800"}\n', b'{"url": {"a": [1]}}\n',
            b'{"url": "a", "width": 1e999}\n', b'{"url": "a", "width": [1]}\n{"url": "b", "width": 4}\n',
            b'{"url": "a", "b": {"c": ' + b'{"d":' * 900 + b"1" + b"}" * 900 + b"}}\n",
            b'{"url": "a", "width": 99999999999999999999999}\n')),
        "gz": Format("list.jsonl.gz", (gzip.compress(_LINES, mtime=0),), ("text_list",), (b"", b"\x1f\x8b")),
        "bz2": Format("list.csv.bz2", (bz2.compress(_CSV),), ("text_list",), (b"", b"BZh9")),
        "zst": Format("list.csv.zst",
                      (pa.compress(_CSV, "zstd", asbytes=True),), ("text_list",), (b"", b"\x28\xb5\x2f\xfd")),
        "parquet": Format("list.parquet", (table, pictures), ("list_source", "filtered_list"),
                          (table.replace(b"a/1.jpg", b"a\xc01.jpg"), table.replace(b"width", b"widt\xe2"),
                           b"", b"PAR1", b"PAR1" * 3, *(table[:end] for end in range(0, len(table), 23)),
                           *(table[:-8] + struct.pack("<I", length) + b"PAR1" for length in (0, 1, 10**6, 2**32 - 1)))),
        "captions_csv": Format("captions.csv", (b"file,caption\na.png,one\n",), ("captions",), (
            b"", b"file,caption\n\xff,a\n", b"file,caption\na.png\n", b"file,caption\na,b,c,d\n",
            b"file,caption\n" + b"a" * 300_000 + b",b\n", b"file,file,caption\na,b,c\n", b"file,caption\na\x00,b\n")),
        "captions_jsonl": Format("captions.jsonl", (b'{"file": "a.png", "caption": "one", "n": 1}\n',), ("captions",), (
            DEEP, DEEP_OBJECT, b'{"file": ' + LONG_NUMBER + b', "caption": ""}', b"[]", b"1", b"null", b"{}", _NOT_UTF8,
            b'["file", "caption"]', b'"file"', b'{"file": "a", "caption": {"b": 1}}\n{"file": null}')),
        "captions_parquet": Format("captions.parquet", (_parquet(pa.table({
            "file": ["a.png", None], "caption": ["one", "two"], "n": pa.array([1, 2**64 - 1], pa.uint64())})),),
            ("captions",), (b"", b"PAR1", table, pictures)),
        "tar": Format("list.tar", (tar, pax), ("tar", "tar_source", "tar_images"), (
            b"", b"\x00" * 511, b"a" * 10_240, *(tar[:end] for end in range(0, len(tar), 500)), *json_members,
            _tar({"a.png": b"x", "a.txt": b"\xff", f"{'b' * 99}": b""}), _tar({"../a.png": b"x", "/b.png": b"y"}))),
        "npy": Format("vectors.npy", (vectors, _npy(np.ones((2, 3), np.float32))), ("array", "embedding_folder"), (
            b"", b"\x93NUMPY", *(vectors[:end] for end in range(0, len(vectors), 5)),
            _npy(np.array([{"a": 1}], object), pickled=True), _npy(np.ones(3)), _npy(np.float16(1)),
            _npy(np.ones((0, 8))),
            *(_npy_header(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}") for kind, shape in (
                ("<f2", (10**12, 768)), ("<f2", (2**62, 2**62)), ("<f2", (-1, 8)), ("|O", (3, 8)), ("<f8", ()),
                ("<U1000000", (10**6,)), ("<M8[s]", (3,)), ("|V0", (10**9,)), ("<f2", "(0,)*70"))),
            _npy_header("[" * 5000), _npy_header("__import__('os').abort()"), _npy_header("{" * 200),
            _npy_header("(" * 3000 + "1" + ")" * 3000)), ("good.parquet",)),
        "keys": Format("keys.parquet", (keys,), ("embedding_metadata",), (
            keys.replace(b"000001", b"0\xd80001"), keys.replace(b"image_path", b"image_pat\xe2"),
            b"", b"PAR1", table, _parquet(pa.table({"image_path": [1, 2, 3]})),
            _parquet(pa.table({"image_path": ["a", None, "b"]})), _parquet(pa.table({"image_path": [["a"]] * 3})),
            _parquet(pa.table({"image_path": ["é\u0000", "", "."]}))), ("good.npy",)),
        "npz": Format("3x8.npz", (_npz(**_ARCHIVE),), ("archive",), (
            b"", b"PK\x03\x04", _npz(embedding=np.ones((3, 8))), _npz(**_ARCHIVE | {"img_id": np.arange(4)}),
            _npz(**_ARCHIVE | {"img_id": np.array(["é", "b", "c"])}), _npz(**_ARCHIVE | {"img_id": np.ones(3)}),
            _npz(**_ARCHIVE | {"patch_coords": np.full((3, 4), np.nan)}),
            _npz(**_ARCHIVE | {"img_id": np.array([b"\xff", b"b", b"c"])}))),
        "safetensors": Format("weights.safetensors", (weights,), ("weights", "compvis"), (
            b"", b"\x00" * 7, b"\x00" * 8, _safetensors(b"{}"), _safetensors(b"{}", 10**15),
            _safetensors(b"{}", 2**64 - 1),
            _safetensors(DEEP), _safetensors(
                b'{"a":{"dtype":"F32","shape":[9999999999,9999999999],"data_offsets":[0,4]}}', data=b"abcd"),
            _safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', data=b"abcd"),
            save({"a.b": torch.zeros(2)}), weights[:1000], weights[:-1]), ("good.json",)),
        "ckpt": Format("model.ckpt", (_torch({"state_dict": _WEIGHTS, "global_step": 5}),), ("compvis",), (
            b"", b"PK\x03\x04", _torch([1, 2]), _torch({}), _torch({"state_dict": {1: torch.zeros(1)}}), _torch(None),
            _torch({"state_dict": _WEIGHTS | {"scale_factor": torch.zeros(3), "betas": torch.zeros(0)}}),
            _torch({"state_dict": _WEIGHTS | {"betas": torch.zeros(3, 3)}}),
            _torch({"state_dict": {"model.diffusion_model.a": torch.zeros(1), "betas": torch.tensor(1)}}))),
        "checkpoint_json": Format("checkpoint.json", (json.dumps(about).encode(),), ("checkpoint_json",), (
            *_JSON_DAMAGE, *_variants(about), *_variants(about["config"]), *(
                json.dumps(about | {"config": about["config"] | {"unet": unet}}).encode()
                for unet in (None, {"model_channels": 10**9}))), ("good.safetensors",)),
        "index": Format("knn.index", indices, ("index",), (
            b"", b"IxFI", *(index[:end] for index in indices for end in range(0, min(len(index), 400), 7)),
            *(index[:place] + struct.pack("<Q", 2**62) + index[place + 8:] for index in indices
              for place in range(4, 120, 4)))),
        "toml": Format("settings.toml", (b'recipe = "tiny"\n[shard]\nimage_size = 32\n[train]\nsteps = 3\n',),
                       ("settings",), (
            b"", b"\xff", b"a = " + b"[" * 100_000, b"[" * 100_000, b"steps = " + LONG_NUMBER,
            b"[train]\nsteps = " + LONG_NUMBER,
            b"recipe = 1", b"recipe = [1]", b"shard = 1", b"[shard]\nimage_size = -1", b"[shard]\nsource = [1]",
            b"[shard]\nimage_size = 99999999999999999999", b"[train]\nsteps = true", b"a" + b".a" * 50_000 + b" = 1",
            b"[train]\nlr = nan", b"[train.unet]\nmodel_channels = []", b"[train.unet]\nchannel_mult = [[1]]",
            b"\x00")),
        "plan": Format("some-plan.json", (json.dumps(_PLAN).encode(),), ("plan",), (*_JSON_DAMAGE, *_variants(_PLAN)),
                       _GOOD),
        "manifest": Format("some-manifest.json", (json.dumps(_MANIFEST).encode(),), ("manifest",),
                           (*_JSON_DAMAGE, *_variants(_MANIFEST),
                            *(json.dumps(_MANIFEST).replace("00:00:00Z", end).encode() for end in ("00:00:0#", "24Z"))),
                           _GOOD),
        "progress": Format("some-progress.json", (json.dumps(_PROGRESS).encode(),), ("progress",),
                           (*_JSON_DAMAGE, *_variants(_PROGRESS)), _GOOD),
        **{name: Format(f"some-{name}.json", (json.dumps(document).encode(),), (name,),
                        (*_JSON_DAMAGE, *_variants(document)), (*_GOOD, "good-run.json"))
           for name, document in _STORE.items()},
        "records": Format("records.parquet", (packed,), ("records", "pack"), (
            b"", b"PAR1", table, *(packed[:end] for end in range(0, len(packed), 61))), _GOOD),
        "metrics": Format("metrics.jsonl", (b'{"step": 1, "loss": 0.5, "seconds": 1.0}\n',), ("metrics",), (
            b"\xff\n", DEEP, b"[]\n", b"1\n", b"{}\n", b'{"step": ' + LONG_NUMBER + b"}\n", b'{"step": "x"}\n')),
    }


def write_whole(folder: Path) -> None:
    """The files that readers need with a damaged one."""
    every = formats()
    for name, data in {"good.parquet": every["keys"].whole[0], "good.npy": every["npy"].whole[0],
                       "good.json": every["checkpoint_json"].whole[0],
                       "good.safetensors": every["safetensors"].whole[0],
                       "good-plan.json": json.dumps(_PLAN | {"inputs": {}}).encode(),
                       "good-manifest.json": every["manifest"].whole[0],
                       "good-run.json": every["run"].whole[0]}.items():
        (folder / name).write_bytes(data)
