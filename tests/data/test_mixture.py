"""Mixtures: how often each data set comes, in which order, and what nothing is trained on."""

import hashlib
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from flowseg_jax.data import held_out, mixture, prepare
from flowseg_jax.data.held_out import HeldOutKeys, held_out_keys
from flowseg_jax.data.leakage import name_key
from flowseg_jax.data.mixture import KeptRecords, MixtureComponent, SampleOrder, build_mixture, repeat_factor_counts
from flowseg_jax.data.train_dataset import TrainDataset
from flowseg_jax.errors import UserError
from tests.helpers import minicoco, minirefcoco


def quiet(_):
    pass


@pytest.fixture(scope="module")
def refcoco(tmp_path_factory):
    """Images 1 and 5 are in train, 2 and 3 in val, 4 in testA."""
    root = tmp_path_factory.mktemp("refcoco")
    instances, refs = minirefcoco.damaged(lambda _, refs: [ref.update(split="val") for ref in refs if ref["image_id"] == 2])
    layout = minirefcoco.write(root / "layout", instances=instances, refs=refs)
    return prepare.prepare(layout, root / "prepared", log=quiet)


@pytest.fixture(scope="module")
def panoptic(tmp_path_factory):
    root = tmp_path_factory.mktemp("panoptic")
    return prepare.prepare(minicoco.write(root / "layout", "panoptic"), root / "prepared", layout="coco-panoptic", log=quiet)


def members(*slots_and_sizes):
    return [MixtureComponent(None, "train", tuple(range(100, 100 + size)), slots) for slots, size in slots_and_sizes]


def test_small_sets_repeat_by_the_rule():
    assert repeat_factor_counts([100]) == [100]
    assert repeat_factor_counts([900, 100]) == [900, 100]  # a share of t is not repeated
    share = 10 / 1010
    assert repeat_factor_counts([1000, 10]) == [1000, int(10 * math.sqrt(0.1 / share))] == [1000, 31]


def test_an_epoch_has_every_slot_once_and_every_image_equally_often():
    order = SampleOrder(members((5, 5), (7, 3)), seed=0)
    assert order.epoch == 12
    seen = Counter()
    for epoch in range(6):
        here = [order(epoch * 12 + place) for place in range(12)]
        assert Counter(number for number, _ in here) == {0: 5, 1: 7}
        assert sorted(record for number, record in here if number == 0) == [100, 101, 102, 103, 104]
        seen.update(record for number, record in here if number == 1)
    assert set(seen) == {100, 101, 102} and max(seen.values()) == min(seen.values()) == 14  # 6 * 7 slots over 3 images


def test_a_set_with_fewer_slots_than_images_walks_a_permutation_that_the_seed_draws():
    """Else epoch 0 would train on the first images in stored order, whatever the seed."""

    def seen(seed, epoch):
        order = SampleOrder(members((8, 8), (5, 40), (13, 10)), seed)
        places = range(epoch * order.epoch, (epoch + 1) * order.epoch)
        return [[record - 100 for number, record in map(order, places) if number == n] for n in range(3)]

    first = {seed: [sorted(records) for records in seen(seed, 0)] for seed in range(4)}
    assert all(len(set(records[1])) == 5 for records in first.values())
    assert len({tuple(records[1]) for records in first.values()}) == 4
    assert len({tuple(records[2]) for records in first.values()}) == 4  # which three come twice
    assert all(records[0] == list(range(8)) for records in first.values())
    walked = [record for epoch in range(8) for record in seen(3, epoch)[1]]
    assert sorted(walked) == list(range(40))  # eight epochs of five are each image once
    assert Counter(record for epoch in range(10) for record in seen(3, epoch)[2]) == dict.fromkeys(range(10), 13)
    walk = np.random.default_rng((3, 2, 1)).permutation(40)  # of the second set: an epoch goes on where the last one ended
    for epoch in range(8):
        assert sorted(seen(3, epoch)[1]) == sorted(walk[5 * epoch : 5 * epoch + 5])


@pytest.mark.parametrize(
    ("sizes", "seed", "digest"),
    [
        ((4000,), 0, "a7b926103d6af347"),  # the demo
        ((16_994,), 0, "b9eb5ebae9b7787b"),  # RefCOCO
        ((118_287,), 3, "4f9427c2ae2123c8"),  # COCO
        ((118_287, 665_298, 16_994, 16_992, 21_899, 239), 0, "72e45164fb07e470"),  # the joint stage
    ],
)
def test_the_order_of_the_shipped_configs_is_as_it_was(sizes, seed, digest):
    """Digests of the order that the published numbers were trained in."""
    counts = repeat_factor_counts(sizes) if len(sizes) > 1 else sizes
    order = SampleOrder(
        [MixtureComponent(None, "train", range(n), slots) for n, slots in zip(sizes, counts, strict=True)], seed
    )
    drawn = [order(place) for place in (*range(500), *range(10**6, 10**6 + 500))]
    assert hashlib.sha256(np.array(drawn, np.int64).tobytes()).hexdigest()[:16] == digest


def test_a_large_order_is_walked_without_memory(monkeypatch):
    """Above the limit: still a permutation that the seed and the epoch draw."""
    monkeypatch.setattr(mixture, "MAX_PERMUTED", 50)
    order, other, again = (SampleOrder(members((61, 61), (50, 100)), seed) for seed in (0, 1, 0))
    epochs = [[order(epoch * 111 + place) for place in range(111)] for epoch in range(3)]
    for drawn in epochs:
        assert sorted(record for number, record in drawn if number == 0) == list(range(100, 161))
    assert sorted(record for drawn in epochs[:2] for number, record in drawn if number == 1) == list(range(100, 200))
    assert epochs[0] != epochs[1] and epochs[0] != [other(place) for place in range(111)]
    assert [again(place) for place in reversed(range(111))] == epochs[0][::-1]
    monkeypatch.undo()
    huge = SampleOrder([MixtureComponent(None, "train", range(10**12), 10**12)], 0)
    assert len({huge(place) for place in range(2000)}) == 2000


def test_kept_records_are_those_that_are_not_left_out():
    for left_out in ((), (0,), (9,), (0, 1, 2), (3, 5, 6, 9), tuple(range(9))):
        kept, want = KeptRecords(10, left_out), [record for record in range(10) if record not in left_out]
        assert list(kept) == want and len(kept) == len(want) and kept[-1] == want[-1]
        assert kept[1:4].tolist() == want[1:4] and kept[:].tolist() == want
        with pytest.raises(IndexError):
            kept[len(want)]


def test_a_key_decides_and_not_its_number(refcoco, panoptic, monkeypatch):
    """Where the numbers of all keys collide, the same images are held out."""
    splits = (refcoco.index(split) for split in refcoco.splits if split != "train")
    keys = [key for split in splits for entry in split for key in entry.identity.holds_out]
    index, real = panoptic.index("train"), held_out.key_numbers
    for record, entry in enumerate(index):
        number = int(index.rows[record : record + 1]["keys"][0, 0])
        monkeypatch.setattr(held_out, "key_numbers", lambda key, number=number: (number, real(key)[1]))
        for chosen, count in ((keys, entry.image_id == 2), ([key for key in keys if key != "coco:2"], 0)):
            _, second = build_mixture([(refcoco, 0.0), (panoptic, 0.0)], held_out=HeldOutKeys(chosen))
            assert second.held_out == count


def test_held_out_keys_take_sixteen_bytes_each_and_are_told_apart():
    texts = [f"coco:{number}" for number in range(3000)]
    keys = HeldOutKeys(texts[:2000] + texts[:1000], HeldOutKeys(texts[1500:2500]))
    assert len(keys) == 2500 and sum(array.nbytes for array in (keys.numbers, keys._rest)) == 16 * 2500
    assert [text in keys for text in texts] == [True] * 2500 + [False] * 500
    assert (np.diff(keys.numbers) > 0).all() and "coco:1" not in HeldOutKeys()


def test_a_split_without_images_is_refused(refcoco, monkeypatch):
    monkeypatch.setattr(type(refcoco), "index", lambda self, split: [])
    with pytest.raises(UserError, match="prepared: split 'train' has no images"):
        build_mixture([(refcoco, 0.0)])


def test_a_run_that_began_in_stored_order_is_told_apart():
    """The digest of mixtures whose order the permutation changed is another one; that of all others is as it was."""

    def digest(slots, size):
        data = TrainDataset.__new__(TrainDataset)
        prepared = type("Prepared", (), {"digest": "d"})
        data.members = [MixtureComponent(prepared, "train", tuple(range(size)), slots)]
        return data.digest

    def before(slots, size):
        return hashlib.sha256(f"d train {slots} ".encode() + np.arange(size, dtype=np.int64).tobytes()).hexdigest()

    assert digest(8, 8) == before(8, 8) and digest(16, 8) == before(16, 8) and digest(5, 8) != before(5, 8)


def test_the_order_is_a_function_of_seed_and_position_alone():
    make = lambda seed=0: SampleOrder(members((5, 5), (7, 3)), seed)  # noqa: E731
    forwards, backwards = make(), make()
    want = [forwards(i) for i in range(60)]
    assert [backwards(i) for i in reversed(range(60))] == want[::-1]
    assert want[:12] != want[12:24] and want != [make(1)(i) for i in range(60)]


def test_weights_are_shares_of_an_epoch(refcoco, panoptic):
    by_rule = build_mixture([(refcoco, 0.0), (panoptic, 0.0)])
    assert [member.samples_per_epoch for member in by_rule] == repeat_factor_counts([2, len(panoptic.index("train"))])
    explicit = build_mixture([(refcoco, 3.0), (panoptic, 1.0)])
    total = 2 + len(panoptic.index("train"))
    assert [member.samples_per_epoch for member in explicit] == [round(0.75 * total), max(1, round(0.25 * total))]
    with pytest.raises(
        UserError, match=r"weights must all be positive, or all be 0 for the repeat-factor rule, got \[1.0, 0.0\]"
    ):
        build_mixture([(refcoco, 1.0), (panoptic, 0.0)])


def test_images_of_evaluation_splits_are_not_trained_on(refcoco, panoptic, tmp_path):
    """Image 2 is in RefCOCO's val under its name of 2014 and in the panoptic training set under that of 2017."""
    keys = held_out_keys([refcoco, panoptic])
    assert "coco:2" in keys and "coco:4" in keys and "coco:1" not in keys
    by_list = tmp_path / "held_out.txt"
    by_list.write_text("2\n\nCOCO_train2014_000000000004.jpg\n")
    for left_out in (keys, held_out_keys([str(refcoco.directory)]), held_out_keys([by_list])):
        first, second = build_mixture([(refcoco, 0.0), (panoptic, 0.0)], held_out=left_out)
        assert first.held_out == 0 and second.held_out == 1
        assert {e.image_id for e in second.entries()} == {e.image_id for e in panoptic.index("train")} - {2}
        drawn = SampleOrder((first, second), seed=0)
        named = {second.prepared.index("train")[record].image_id for i in range(40) for n, record in [drawn(i)] if n == 1}
        assert named == {1}


def own(root, pictures, split):
    """A prepared data set of one's own: {file name: shade of the picture}."""
    root.mkdir()
    lines = []
    for name, shade in pictures.items():
        Image.new("RGB", (20, 10), (shade, 0, 0)).save(root / name)
        lines.append({"image": name, "expressions": ["x"], "mask": [1, 1, 9, 1, 9, 9], "split": split})
    (root / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return prepare.prepare(root, root.parent / f"{root.name}-prepared", layout="jsonl", log=quiet)


def test_other_pictures_are_told_apart_by_what_is_in_them(tmp_path):
    """Two sets may call different pictures alike, and the same picture differently."""
    train = own(tmp_path / "a", {"1.png": 10, "2.png": 20, "3.png": 30}, "train")
    evaluated = own(tmp_path / "b", {"1.png": 99, "other.png": 20}, "val")
    (member,) = build_mixture([(train, 0.0)], held_out=held_out_keys([evaluated]))
    assert [e.file_name for e in member.entries()] == ["1.png", "3.png"]
    by_name = tmp_path / "names.txt"
    by_name.write_text("3.png\n²\n")
    (member,) = build_mixture([(train, 0.0)], held_out=held_out_keys([by_name]))
    assert [e.file_name for e in member.entries()] == ["1.png", "2.png"]


def test_numbered_pictures_of_one_s_own_are_not_coco_s(refcoco, tmp_path):
    """Two cameras number their pictures alike; a copy of a picture of COCO is found by its content."""
    root = tmp_path / "a"
    for camera in ("cam1", "cam2"):
        (root / camera).mkdir(parents=True)
    copy = refcoco.source("val")[0]  # COCO's number 2
    lines = []
    for k, (camera, split) in enumerate((c, s) for c, s in (("cam1", "train"), ("cam2", "val")) for _ in range(3)):
        name = f"{camera}/{k % 3 + 1:012d}.png"
        Image.new("RGB", (20, 10), (40 * k, 0, 0)).save(root / name)
        lines.append({"image": name, "expressions": ["x"], "mask": [1, 1, 9, 1, 9, 9], "split": split})
    (root / "cam1" / "copy.jpg").write_bytes(copy.image)
    lines.append({"image": "cam1/copy.jpg", "expressions": ["x"], "mask": [1, 1, 9, 1, 9, 9]})
    (root / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mine = prepare.prepare(root, tmp_path / "prepared", layout="jsonl", log=quiet)
    (alone,) = build_mixture([(mine, 0.0)], held_out=held_out_keys([mine]))
    assert len(alone.indices) == 4 and alone.held_out == 0
    (beside,) = build_mixture([(mine, 0.0)], held_out=held_out_keys([mine, refcoco]))  # whose val has COCO's 2 and 3
    assert copy.image_id == 2 and beside.held_out == 1
    assert [e.file_name for e in beside.entries()] == [f"cam1/{k:012d}.png" for k in (1, 2, 3)]


def test_a_copy_in_one_s_own_evaluation_set_is_not_trained_on(refcoco, tmp_path):
    root = tmp_path / "a"
    root.mkdir()
    (root / "copy.jpg").write_bytes(refcoco.source("train")[0].image)
    line = {"image": "copy.jpg", "expressions": ["x"], "mask": [1, 1, 9, 1, 9, 9], "split": "val"}
    (root / "own.jsonl").write_text(json.dumps(line))
    mine = prepare.prepare(root, tmp_path / "prepared", layout="jsonl", log=quiet)
    (member,) = build_mixture([(refcoco, 0.0)], held_out=held_out_keys([mine]))
    assert member.held_out == 1 and list(member.indices) == [1]


def test_visual_genome_tells_which_of_its_pictures_are_held_out(refcoco, tmp_path):
    genome = tmp_path / "image_data.json"
    genome.write_text(
        json.dumps([{"image_id": 77, "coco_id": 2}, {"image_id": 78, "coco_id": 1}, {"image_id": 79, "coco_id": None}])
    )
    keys = held_out_keys([genome, refcoco])  # in any order
    folders = ("vg/VG_100K", "vg/VG_100K_2", "gqa/images")
    assert all(name_key(f"{folder}/77.jpg") in keys for folder in folders)
    assert not any(name_key(f"{folder}/{number}.jpg") in keys for folder in folders for number in (78, 79))
    assert len(keys) == len(held_out_keys([refcoco])) + 3
    genome.write_text("[{}]")
    with pytest.raises(UserError, match=r"image_data.json is not Visual Genome's image_data.json \('image_id'\)"):
        held_out_keys([genome])


def test_a_set_without_evaluation_images_holds_nothing_out_and_says_so(tmp_path):
    train = own(tmp_path / "a", {"1.png": 10}, "train")
    with pytest.raises(UserError, match="a-prepared has no evaluation split: prepare it with all of its splits"):
        held_out_keys([train.directory])
    assert len(held_out_keys([train])) == 0


def test_the_digest_of_what_is_trained_on_knows_images_and_slots(refcoco, panoptic):
    """A resumed run compares it: the position in the data means something in these data alone."""

    def digest(*sets, **left_out):
        data = TrainDataset.__new__(TrainDataset)
        data.members = build_mixture(list(sets), **left_out)
        return data.digest

    both = (refcoco, 0.0), (panoptic, 0.0)
    digests = [
        digest(*both),
        digest(*both, held_out=HeldOutKeys(["coco:2"])),
        digest((refcoco, 3.0), (panoptic, 1.0)),
        digest(both[0]),
    ]
    assert len(set(digests)) == 4 and digest(*both) == digests[0]


def test_held_out_errors(refcoco, panoptic, tmp_path):
    with pytest.raises(UserError, match=r"data.held_out: nowhere is not there; prepare that evaluation set, name a text file"):
        held_out_keys(["nowhere"])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="binary is no text file of image names"):
        held_out_keys([tmp_path / "binary"])
    everything = HeldOutKeys(e.identity.identity for e in panoptic.index("train"))
    with pytest.raises(UserError, match=r"every image of split 'train' is held out for evaluation \(data.held_out\)"):
        build_mixture([(panoptic, 0.0)], held_out=everything)


def test_positions_far_away_cost_nothing_more():
    order = SampleOrder(members((50, 50), (70, 30)), seed=0)
    far = [order(120 * 10**9 + i) for i in range(120)]
    assert Counter(n for n, _ in far) == Counter(itertools.chain([0] * 50, [1] * 70))
