"""The LLaVA reader: its oddities and every error message."""

import pickle
from collections import Counter

import pytest
from PIL import Image

from flowseg_jax.data.formats import open_layout
from flowseg_jax.data.formats.llava import Llava, hashed_id, turns_of, without_placeholder
from flowseg_jax.data.records import RecordErrors, Turn, examples
from flowseg_jax.errors import UserError
from tests.helpers import minillava as mini
from tests.helpers.minirefcoco import jpeg


def chats(layout, notes=None):
    return {e.file_name: [(t.question, t.answer) for t in e.turns] for e in examples(layout, "train", notes)}


def test_reads_the_layout(tmp_path):
    layout = open_layout("llava", mini.write(tmp_path))
    assert (layout.task, layout.categories, layout.splits, layout.size("train")) == ("chat", (), ("train",), 7)
    notes = Counter()
    assert chats(layout, notes) == {
        "00453/004539375.jpg": [("Describe it briefly.", "a red cup")],
        "coco/train2017/7.jpg": [("What is it?", "A dog."), ("Its colour?", "Brown.")],
        "gqa/images/8.jpg": [("Where?", "Here.")],
        "vg/VG_100K/9.jpg": [("Who?", "A man.")],
        "ocr_vqa/images/0006.gif": [("Title?", "Cats")],
    }
    assert notes == {
        "samples without an image: left out": 1,
        "chats cut to whole question-answer pairs": 2,
        "chats without a whole question-answer pair: left out": 1,
        "images whose suffix is not the one in the JSON": 1,
    }


def test_examples_hold_the_stored_image(tmp_path):
    first = Llava(mini.write(tmp_path)).example("train", 0, Counter())
    assert (first.height, first.width, first.annotations, first.expressions) == (20, 30, (), ())
    assert first.image == jpeg(mini.PICTURE)
    assert first.image_id == hashed_id("004539375", "00453/004539375.jpg") == 3877530850648193128
    assert 0 <= first.image_id < 1 << 62 and first.image_id != hashed_id("004539375", "x.jpg")


def test_a_null_image_is_none(tmp_path):
    table = mini.samples()
    table[0]["image"] = None
    notes = Counter()
    assert Llava(mini.write(tmp_path, table=table)).example("train", 0, notes) is None
    assert notes == {"samples without an image: left out": 1}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("<image>\nWhat?", "What?"),
        ("What?\n<image>", "What?"),
        ("<image>", ""),
        ("Look at <image> and say.", "Look at and say."),
        ("Look.\n<image>\nSay.", "Look.\nSay."),
        ("  What?\n", "What?"),
    ],
)
def test_the_mark_is_taken_out(text, want):
    assert without_placeholder(text) == want


@pytest.mark.parametrize(
    ("order", "want"),
    [
        ("hghg", "01 23"),
        ("ghg", "12"),
        ("hgh", "01"),
        ("hhghg", "12 34"),
        ("hgghghg", "34 56"),  # the longest run, not the first
        ("hgghgghg", "01"),  # of runs of equal length the first
        ("hghggh", "01 23"),
        ("gh", ""),
        ("h", ""),
        ("", ""),
    ],
)
def test_chats_are_cut_to_the_longest_run_of_pairs(order, want):
    table = [{"from": {"h": "human", "g": "gpt"}[side], "value": str(i)} for i, side in enumerate(order)]
    assert turns_of(table)[1] == tuple(Turn(pair[0], pair[1]) for pair in want.split())


def test_a_pair_with_an_empty_half_is_none():
    assert turns_of(mini.turns("a", "b", "c", " ", "<image>", "d", "e", "f", "g", "h")) == (6, (Turn("e", "f"), Turn("g", "h")))


@pytest.mark.parametrize("place", ["images", ".", "LLaVA-Pretrain/images", "../llava_images", "../images"])
def test_images_are_found_in_the_usual_places(tmp_path, place):
    assert len(chats(Llava(mini.write(tmp_path / "a", images=place)))) == 5


def test_named_image_folder(tmp_path):
    mini.write(tmp_path / "a", images="../elsewhere")
    with pytest.raises(
        UserError, match=r"json: \[0\] \(id 004539375\)\.image: image '00453/004539375\.jpg' is missing \(looked"
    ):
        chats(Llava(tmp_path / "a"))
    assert len(chats(Llava(tmp_path / "a", images=tmp_path / "elsewhere"))) == 5


def test_which_file(tmp_path):
    with pytest.raises(UserError, match=r"no \*\.json here; name the file of the chats with --file"):
        Llava(tmp_path)
    mini.write(tmp_path, name="mine.json")
    assert Llava(tmp_path).annotation_files == (tmp_path / "mine.json",)
    mini.write(tmp_path, name="blip_laion_cc_sbu_558k_meta.json")
    with pytest.raises(UserError, match=r"blip_laion_cc_sbu_558k_meta\.json, mine\.json here; name the file"):
        Llava(tmp_path)
    assert open_layout("llava", tmp_path, file="mine.json").source == "llava chats mine.json"
    mini.write(tmp_path, name="blip_laion_cc_sbu_558k.json")
    assert Llava(tmp_path).path.name == "blip_laion_cc_sbu_558k.json"  # lies beside its _meta.json
    mini.write(tmp_path)
    with pytest.raises(UserError, match=r"blip_laion_cc_sbu_558k\.json, llava_v1_5_mix665k\.json here"):
        Llava(tmp_path)
    with pytest.raises(UserError, match=r"other\.json: missing"):
        Llava(tmp_path, file="other.json")


DAMAGE = {
    "no id": (lambda s: s.pop("id"), r"\[0\]: field 'id' is missing"),
    "image of wrong type": (
        lambda s: s.update(image=["a.jpg"]),
        r"\[0\] \(id 004539375\)\.image: expected str, got \['a\.jpg'\]",
    ),
    "no conversations": (lambda s: s.pop("conversations"), r"\(id 004539375\): field 'conversations' is missing"),
    "turn of wrong type": (lambda s: s.update(conversations=["a"]), r"conversations\[0\]: expected an object with fields"),
    "third party": (lambda s: s["conversations"][1].update({"from": "system"}), r"\[1\]\.from: expected 'human' or 'gpt', got"),
    "no value": (lambda s: s["conversations"][1].pop("value"), r"conversations\[1\]: field 'value' is missing"),
    "value of wrong type": (
        lambda s: s["conversations"][0].update(value=3),
        r"conversations\[0\]\.value: expected str, got 3",
    ),
    "two images": (
        lambda s: s.update(conversations=mini.turns("<image> a", "b", "<image> c", "d")),
        r"\(id 004539375\)\.conversations: <image> occurs 2 times; a sample has one image",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_errors_at_opening_are_raised_or_kept(tmp_path, case):
    change, message = DAMAGE[case]
    table = mini.samples()
    change(table[0])
    mini.write(tmp_path, table=table)
    with pytest.raises(UserError, match=message) as caught:
        Llava(tmp_path)
    assert "\n" not in str(caught.value) and "llava_v1_5_mix665k.json" in str(caught.value)
    problems = RecordErrors(keep=True)
    layout = Llava(tmp_path, problems=problems)
    assert problems.found == [str(caught.value)] and layout.size("train") == 6
    assert next(iter(chats(layout))) == "coco/train2017/7.jpg"


def test_messages_count_in_the_file_not_in_what_is_left(tmp_path):
    table = mini.samples()
    del table[0]["id"]
    table[2]["image"] = "../7.jpg"
    layout = Llava(mini.write(tmp_path, table=table), problems=RecordErrors(keep=True))
    with pytest.raises(UserError, match=r"\[2\] \(id 7\)\.image: '\.\./7\.jpg' leads out of the folder"):
        layout.example("train", 1, Counter())


@pytest.mark.parametrize("name", ["", ".", "no-such.jpg", "a\0.jpg", "x" * 300 + ".jpg", "/etc/hosts"])
def test_image_names_that_lead_nowhere(tmp_path, name):
    layout = Llava(mini.write(tmp_path, table=[mini.samples()[0] | {"image": name}]))
    with pytest.raises(UserError, match=r"\[0\] \(id 004539375\)\.image: ") as caught:
        layout.example("train", 0, Counter())
    assert "\n" not in str(caught.value)


def test_damaged_and_rotated_images(tmp_path):
    layout = Llava(mini.write(tmp_path))
    path = tmp_path / "images" / "00453" / "004539375.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    mini.PICTURE.save(path, exif=exif)
    notes = Counter()
    assert layout.example("train", 0, notes).height == 20
    assert notes == {"images with an EXIF rotation, read as they are stored": 1}
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"004539375\.jpg: truncated or damaged image"):
        layout.example("train", 0, notes)


def test_files_without_content(tmp_path):
    with pytest.raises(UserError, match=r"json: expected a list of samples, got dict"):
        Llava(mini.write(tmp_path, table={}))
    with pytest.raises(UserError, match=r"json: holds no usable sample"):
        Llava(mini.write(tmp_path, table=[]))
    with pytest.raises(UserError, match=r"no such folder"):
        Llava(tmp_path / "llava_v1_5_mix665k.json")


def test_unknown_split_and_pickling(tmp_path):
    layout = pickle.loads(pickle.dumps(Llava(mini.write(tmp_path))))
    assert len(chats(layout)) == 5
    for method in (layout.size, lambda split: layout.example(split, 0, Counter())):
        with pytest.raises(UserError, match=r"unknown split 'trian' \(did you mean 'train'\?\)"):
            method("trian")
