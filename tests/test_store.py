"""The feature store: plain Zarr, done shard by shard, and never silently wrong."""

from __future__ import annotations

import json
import mmap
import re
import resource
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zarr
from conftest import complaint
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.data.manifest import Face, Manifest
from cafe.errors import UserError
from cafe.pipeline.features.integrity import find_stores
from cafe.pipeline.features.key import FeatureKey, StoreInfo, default_shard_rows
from cafe.pipeline.features.store import FeatureReader, FeatureStore, allocate, find_pages, verify, view_digests
from cafe.pipeline.need import Need

ROWS, VIEWS, WIDTH = 10, 3, 4
KEY = FeatureKey(
    images="a" * 64, backbone="timm:x", weights="b" * 64, precision="fp32", input_size=32, interpolation="bilinear",
    normalisation=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), policy={"name": "paper", "noise_variance": 30.0}, view_seed=0,
    views=VIEWS, maps=True, dtype="float16",
)  # fmt: skip
CHANGES = {
    "images": "c" * 64, "backbone": "timm:y", "weights": "d" * 64, "precision": "bf16", "input_size": 48,
    "interpolation": "bicubic", "normalisation": ((0.4, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "policy": {"name": "paper", "noise_variance": 31.0}, "view_seed": 1, "views": 4, "maps": False, "dtype": "float32",
    "channels": "bgr", "batch_size": 1, "max_megapixels": 60,
}  # fmt: skip
ABOUT = StoreInfo(KEY, "news", "timm:x", ROWS, WIDTH, (2, 2, 2), shard_rows=4)
MANIFEST = Manifest.from_faces(
    "news", "/data", [Face(f"{n}.jpg", f"{n}.jpg", n % 7, "train", None, 8, 8, str(n)) for n in range(ROWS)]
)


def features(shard: int, store: FeatureStore) -> dict[str, np.ndarray]:
    random = np.random.default_rng(shard)
    rows = len(store.info.rows_of(shard))
    return {"pooled": random.normal(size=(rows, VIEWS, WIDTH)), "map": random.normal(size=(rows, VIEWS, 2, 2, 2))}


def filled(folder: Path) -> FeatureStore:
    store = FeatureStore.create(UPath(folder), ABOUT, MANIFEST)
    for shard in store.pending():
        store.write_shard(shard, features(shard, store), {5: "file is empty"} if shard == 1 else {})
    return store


def contents(store: FeatureStore) -> dict[str, bytes]:
    return {str(path.relative_to(store.path)): path.read_bytes() for path in store.path.rglob("*") if path.is_file()}


def test_any_zarr_reader_opens_it_with_the_sample_beside_each_feature(tmp_path: Path) -> None:
    store = filled(tmp_path)
    group = zarr.open_group(str(store.path / "store.zarr"), mode="r")
    assert group["pooled"].shape == (ROWS, VIEWS, WIDTH)
    assert group["pooled"].dtype == np.float16
    assert group["map"].shape == (ROWS, VIEWS, 2, 2, 2)
    assert list(group["sample_id"][:]) == MANIFEST.sample_ids
    assert group["label"][:].tolist() == MANIFEST.labels.tolist()
    assert group["valid"][:].tolist() == [row != 5 for row in range(ROWS)]
    assert group.attrs["key"]["backbone"] == "timm:x"
    expected = features(1, store)["pooled"].astype(np.float16)
    np.testing.assert_array_equal(group["pooled"][4], expected[0])
    assert np.isnan(group["pooled"][5]).all()


def test_a_store_of_a_large_manifest_is_the_same_and_says_so_instead_of_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = filled(tmp_path / "whole")
    monkeypatch.setattr("cafe.data.manifest.LARGE", 5)
    monkeypatch.setattr("cafe.data.rows.ROWS_A_FILE", 3)
    place = UPath(tmp_path / "news.parquet")
    MANIFEST.save(place)
    store = FeatureStore.create(UPath(tmp_path), ABOUT, Manifest.load(place))
    for shard in store.pending():
        store.write_shard(shard, features(shard, store), {5: "file is empty"} if shard == 1 else {})
    assert store.receipts.skipped_paths(Manifest.load(place)) == [("5.jpg", "file is empty")]
    own, others = contents(store), contents(whole)
    noted = json.loads(own.pop("checksums.json"))
    assert noted["manifest"] == [MANIFEST.digest, *EXPRESSIONS]
    assert noted["files"] == json.loads(others.pop("checksums.json"))["files"]
    assert own == others
    shutil.rmtree(tmp_path / "news.rows")
    planned = Manifest.load(place)
    assert FeatureStore.create(UPath(tmp_path), ABOUT, planned).pending() == []
    replace(MANIFEST, table=MANIFEST.table.set_column(2, "label", pa.array([6] * ROWS, pa.int8()))).save(place)
    relabelled = FeatureStore.create(UPath(tmp_path), ABOUT, Manifest.load(place))
    assert relabelled.array("label")[:].tolist() == [6] * ROWS
    assert (relabelled.pending(), verify(relabelled.path)) == ([], [])
    MANIFEST.save(place)
    (store.path / "checksums.json").unlink()  # as a kill while labels are written leaves it
    again = FeatureStore.create(UPath(tmp_path), ABOUT, Manifest.load(place))
    assert again.array("label")[:].tolist() == MANIFEST.labels.tolist()
    assert contents(again)["checksums.json"] == contents(store)["checksums.json"]


def test_a_store_of_zarr_2_which_can_hold_pickled_objects_is_not_opened(tmp_path: Path) -> None:
    store = filled(tmp_path)
    shutil.rmtree(store.path / "store.zarr")
    group = zarr.open_group(str(store.path / "store.zarr"), mode="w", zarr_format=2)
    group.create_array("pooled", data=np.zeros((ROWS, VIEWS, WIDTH), np.float16))
    with pytest.raises(UserError, match="Zarr cannot open it"):
        FeatureStore(store.path, store.info)


def test_a_shard_is_one_object(tmp_path: Path) -> None:
    store = filled(tmp_path)
    objects = sorted(p.name for p in (store.path / "store.zarr" / "pooled" / "c").iterdir())
    assert objects == ["0", "1", "2"]


def test_a_shard_counts_only_with_a_whole_receipt_and_is_then_the_same(tmp_path: Path) -> None:
    whole = filled(tmp_path / "whole")
    store = FeatureStore.create(UPath(tmp_path / "killed"), ABOUT, MANIFEST)
    assert store.pending() == [0, 1, 2]
    store.write_shard(0, features(0, store), {})
    store.array("pooled")[4:6] = 9.0  # a shard half written, without its receipt
    store.receipts.path(2).touch()  # a receipt torn by a kill
    again = FeatureStore.create(UPath(tmp_path / "killed"), ABOUT, MANIFEST)
    assert again.pending() == [1, 2]
    for shard in again.pending():
        again.write_shard(shard, features(shard, again), {5: "file is empty"} if shard == 1 else {})
    assert contents(again) == contents(whole)


def test_a_store_left_half_made_is_made_again_and_one_without_its_description_keeps_its_features(
    tmp_path: Path,
) -> None:
    half = FeatureStore.create(UPath(tmp_path / "half"), ABOUT, MANIFEST).path
    (half / "about.json").unlink()
    (half / "store.zarr" / "valid" / "zarr.json").unlink()
    assert find_stores(UPath(tmp_path), "half") == []
    assert FeatureStore.create(UPath(tmp_path / "half"), ABOUT, MANIFEST).pending() == [0, 1, 2]

    store = filled(tmp_path / "whole")
    before = contents(store)
    (store.path / "about.json").unlink()
    assert FeatureStore.create(UPath(tmp_path / "whole"), ABOUT, MANIFEST).pending() == []
    assert contents(store) == before


def test_leftovers_of_killed_writers_are_swept_only_from_finished_stores(tmp_path: Path) -> None:
    store = filled(tmp_path)
    leftover = store.path / "store.zarr" / "pooled" / "c" / "0" / "0" / ".0.0a1b2c3d.part"
    leftover.touch()
    store.receipts.path(0).rename(tmp_path / "aside")
    store.finish()
    assert leftover.exists()
    (tmp_path / "aside").rename(store.receipts.path(0))
    store.finish()
    assert not leftover.exists()


def test_loading_an_unfinished_store_says_how_to_finish_it(tmp_path: Path) -> None:
    store = FeatureStore.create(UPath(tmp_path), ABOUT, MANIFEST)
    store.write_shard(0, features(0, store), {})
    with pytest.raises(UserError, match="lack 2 of 3 shards: run `cafe extract` again"):
        store.read_view("pooled", 0)


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.array("pooled")[8] = 1.0
    with pytest.raises(UserError, match=r"shard 2 is not what was written.: run `cafe store repair "):
        store.read_view("pooled", 0)
    labels = store.path / "store.zarr/label/c/0"
    content = bytearray(labels.read_bytes())
    content[0] ^= 1  # which no decoder reads
    labels.write_bytes(content)
    assert "label is not what was written): run `cafe store repair " in complaint(
        FeatureStore.create, UPath(tmp_path), ABOUT, MANIFEST
    )


@pytest.mark.filterwarnings("error")  # of what the type cannot hold NumPy need not warn, too
@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (70_000.0, "float16")])
def test_features_that_are_no_numbers_are_refused_with_the_name_of_the_face(
    tmp_path: Path, value: float, dtype: str
) -> None:
    store = FeatureStore.create(UPath(tmp_path), replace(ABOUT, key=replace(KEY, dtype=dtype)), MANIFEST)
    arrays = features(1, store)
    arrays["map"][[0, 3], 2, 1] = value  # of 4.jpg and 7.jpg; 70,000 is too much for 16 bits
    with pytest.raises(UserError, match=r"The features of 7.jpg in .* are NaN or infinite"):
        store.write_shard(1, arrays, {4: "file is empty"})
    assert 1 in store.pending()
    store.write_shard(1, arrays, {4: "file is empty", 7: "file is empty"})
    assert 1 not in store.pending()


@pytest.mark.parametrize("share", [0.4, 0.0], ids=["in memory", "mapped"])
def test_reading_gives_the_rows_of_the_wanted_view(tmp_path: Path, share: float) -> None:
    store = filled(tmp_path)
    reader = FeatureReader([[store]], ("pooled", "map"), share)
    rows = np.array([7, 0, 4])
    for view in (2, 0, 2):
        for name, values in reader.read(rows, view).items():
            np.testing.assert_array_equal(values, store.array(name)[:][rows, view])
    assert sorted(reader.kept) == ([(0, 1), (2, 1)] if share else [(2, 1)])  # without room only the last view is kept
    assert isinstance(reader.kept[2, 1][0]["map"][0].base, mmap.mmap) == (share == 0)


@pytest.mark.parametrize("workers", [2, 3, 16])
def test_workers_hold_a_view_together_each_its_part_of_the_shards(tmp_path: Path, workers: int) -> None:
    first, second = filled(tmp_path / "first"), filled(tmp_path / "second")
    first.array("pooled")[2, 1, 0] = -0.0  # a zero whose sign a sum of numbers would lose
    first.receipts.write(0, {}, {name: view_digests(first.array(name)[:4]) for name in ("pooled", "map")}, {})
    layers = [[first, second], [second, first]]  # two manifests of two layers
    whole, rows = FeatureReader(layers, ("pooled", "map")), np.array([19, 2, 0, 11, 2, 7])
    readers = [FeatureReader(layers, ("pooled", "map")) for _ in range(workers)]
    held = [reader.read_held(rows, 1, number, workers) for number, reader in enumerate(readers)]
    for name, expected in whole.read(rows, 1).items():
        total = np.sum([part[name].view(np.uint8) for part in held], axis=0, dtype=np.uint8)
        np.testing.assert_array_equal(total, expected.view(np.uint8))
    rows_held = [sum(len(values) for values in reader.kept[1, workers][0]["pooled"]) for reader in readers]
    assert sum(rows_held) == 2 * ROWS
    assert max(rows_held) <= 2 * 4 * -(-3 // workers)


def test_a_disk_without_room_for_a_view_is_said_before_it_is_written_to(tmp_path: Path) -> None:
    """A map beyond the end of its file ends a process by a signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert "has no room for it either" in complaint(allocate, (100, 10), np.dtype("float32"), 0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert allocate((100, 10), np.dtype("float32"), 0.0).shape == (100, 10)


def test_rows_of_a_view_on_disk_are_fetched_page_by_page_and_not_with_megabytes_around_them() -> None:
    pages = find_pages(np.array([9, 0, 1, 7, 9]), 1000, 4096)  # rows 0 and 1 in page 0, 7 in page 1, 9 in 2
    assert pages == [(0, 3 * 4096)]
    assert find_pages(np.array([100, 4, 50]), 4096, 4096) == [(4 * 4096, 4096), (50 * 4096, 4096), (100 * 4096, 4096)]
    assert find_pages(np.array([3]), 6000, 4096) == [(4 * 4096, 2 * 4096)]  # bytes 18,000 to 24,000
    assert find_pages(np.array([], int), 6000, 4096) == []
    view = allocate((4, 5000), np.dtype("float32"), 0.0)
    address = f"{view.ctypes.data:x}-"
    (own,) = re.findall(
        rf"^{address}.*?^VmFlags: (.*?)$", Path("/proc/self/smaps").read_text(), re.DOTALL | re.MULTILINE
    )
    assert "rr" in own.split()  # read in random order


def test_a_view_is_trusted_without_reading_the_others(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.array("pooled")[8, 1] = 1.0
    np.testing.assert_array_equal(store.read_view("pooled", 0), store.array("pooled")[:, 0])
    with pytest.raises(UserError, match=r"shard 2 is not what was written.: run `cafe store repair "):
        store.read_view("pooled", 1)


def test_a_corrected_label_reaches_the_store_and_recomputes_nothing(tmp_path: Path) -> None:
    filled(tmp_path)
    table = MANIFEST.table.set_column(2, "label", [[6] * ROWS]).cast(MANIFEST.table.schema)
    again = FeatureStore.create(UPath(tmp_path), ABOUT, replace(MANIFEST, table=table))
    assert again.pending() == []
    assert again.array("label")[:].tolist() == [6] * ROWS


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_of_the_key_names_another_store_and_is_named_when_it_differs(field: str) -> None:
    other = replace(KEY, **{field: CHANGES[field]})
    assert other.digest != KEY.digest
    equal = {name: value for name, value in vars(KEY).items() if name not in ("views", "maps")}
    differences = Need("news", equal, VIEWS, maps=True).differences(
        replace(ABOUT, key=other, batch_size=other.batch_size)
    )
    assert [difference.partition(":")[0] for difference in differences] == ([] if field == "views" else [field])


def test_a_field_added_later_renames_no_store() -> None:
    @dataclass(frozen=True)
    class LaterKey(FeatureKey):
        sharpening: float = 0.0

    assert LaterKey(**asdict(KEY)).digest == KEY.digest
    assert LaterKey(**asdict(KEY), sharpening=0.5).digest != KEY.digest


def test_a_store_of_an_older_format_is_listed_but_serves_nobody(tmp_path: Path) -> None:
    store = filled(tmp_path / "news")
    record = json.loads((store.path / "about.json").read_text())
    del record["version"]
    (store.path / "about.json").write_text(json.dumps(record))
    ((path, about),) = find_stores(UPath(tmp_path), "news")
    assert "in the old format 1" in about.describe()
    assert Need("news").find([(path, about)]) == []
    assert Need("news").find([(path, ABOUT)]) == [(path, ABOUT)]


def test_the_key_survives_its_json(tmp_path: Path) -> None:
    filled(tmp_path / "news")
    ((_, about),) = find_stores(UPath(tmp_path), "news")
    assert about == ABOUT
    assert about.key.digest == KEY.digest


@pytest.mark.parametrize(
    ("rows", "views", "width", "map_shape", "expected"),
    [
        (10_000_000, 1, 512, None, 4096),  # 2,442 objects of 4 MB
        (12_000, 8, 512, None, 512),
        (1_000, 1, 512, None, 63),  # at least 16 shards
        (100, 1, 512, None, 32),
        (300_000, 1, 512, (512, 7, 7), 81),
    ],
)
def test_shards_are_about_4_megabytes(
    rows: int, views: int, width: int, map_shape: tuple[int, int, int] | None, expected: int
) -> None:
    assert default_shard_rows(rows, views, width, map_shape, 2) == expected
