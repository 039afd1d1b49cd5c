"""LLaVA's chats about images: one JSON (`blip_laion_cc_sbu_558k.json`, `llava_v1_5_mix665k.json`, ...) and image folders.

Oddities handled here: samples without an image; chats that start with an answer or end with a question; `<image>` before,
after or inside the text; images of OCR-VQA whose suffix is not the one that the JSON says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from flowseg_jax.data.checks import check_text
from flowseg_jax.data.formats.reading import ImageFolders, field, hashed_id, image_bytes, read_json, root_folder, visible
from flowseg_jax.data.records import Example, RecordErrors, Turn
from flowseg_jax.data.tokenizer import IMAGE
from flowseg_jax.errors import UserError, did_you_mean, listed, quoted

KNOWN = ("blip_laion_cc_sbu_558k.json", "llava_v1_5_mix665k.json")
IMAGE_DIRS = (
    "images",
    ".",
    "LLaVA-Pretrain/images",
    "../LLaVA-Pretrain/images",
    "llava_images",
    "../llava_images",
    "data",
    "../images",
    "..",
)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")


def chat_file(root: Path, file: str | Path | None) -> Path:
    """The JSON to read: the given one, else the known one, else the only one."""
    if file is not None:
        return root / file
    found = [path for path in visible(root, "*.json") if path.is_file()]
    known = [path for path in found if path.name in KNOWN] or found
    if len(known) != 1:
        names = ", ".join(path.name for path in known) or "no *.json"
        raise UserError(f"{root}: {names} here; name the file of the chats with --file")
    return known[0]


def without_placeholder(text: str) -> str:
    """The text without its first `<image>` and the white space around it."""
    before, _, after = text.partition(IMAGE)
    between = "\n" if before.endswith("\n") or after.startswith("\n") else " "
    return between.join(part for part in (before.strip(), after.strip()) if part)


def turns_of(conversations: Sequence[dict[str, str]]) -> tuple[int, tuple[Turn, ...]]:
    """The longest run of whole pairs, a question, then its answer, neither of them empty: (where it begins, its turns)."""
    best: tuple[int, list[Turn]] = 0, []
    run: list[Turn] = []
    i = start = 0
    while i + 1 < len(conversations):
        first, second = conversations[i : i + 2]
        question, answer = without_placeholder(first["value"]), second["value"].strip()
        if (first["from"], second["from"]) == ("human", "gpt") and question and answer:
            if not run:
                start = i
            run.append(Turn(question, answer))
            i += 2
        else:
            run = []
            i += 1
        if len(run) > len(best[1]):  # of several equally long ones, the first
            best = start, run
    return best[0], tuple(best[1])


class Llava:
    """An opened file of chats.

    Args:
        root: folder that holds the JSON.
        images: folder of the images; by default the usual places in and beside the root.
        file: name of the JSON, needed where the root holds several.
        problems: what is done about a damaged sample.

    Raises:
        UserError: the file is missing or damaged, or a sample has no id or a turn neither of human nor of gpt. Images are
            checked by `example`.
    """

    task = "chat"
    categories: tuple[str, ...] = ()

    def __init__(
        self,
        root: str | Path,
        *,
        images: str | Path | None = None,
        file: str | Path | None = None,
        problems: RecordErrors | None = None,
    ):
        problems = problems or RecordErrors()
        root = root_folder(root)
        self.path = chat_file(root, file)
        self.source = f"llava chats {self.path.name}"
        self.annotation_files = (self.path,)
        self._folders = ImageFolders.of(root, IMAGE_DIRS, images)
        table = read_json(self.path)
        if not isinstance(table, list):
            raise UserError(f"{self.path}: expected a list of samples, got {type(table).__name__}")
        self._samples: list[tuple[int, dict[str, Any]]] = []  # with the place in the file, for messages
        for i, sample in enumerate(table):
            with problems.record():
                _check(sample, f"{self.path}: [{i}]")
                self._samples.append((i, sample))
        if not self._samples:
            raise problems.nothing_left(f"{self.path}: holds no usable sample")

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train",)

    def size(self, split: str) -> int:
        """Number of samples, those without an image included."""
        if split != "train":
            raise UserError(f"{self.path}: unknown split {split!r}{did_you_mean(split, self.splits)}")
        return len(self._samples)

    def image_file(self, split: str, index: int) -> tuple[str, Path] | None:
        """Name and file of the image of sample `index`; None if it has no image. UserError if it is missing."""
        self.size(split)
        i, sample = self._samples[index]
        if sample.get("image") is None:
            return None
        return self._find(sample["image"], f"{self._where(i, sample)}.image", Counter())

    def _where(self, i: int, sample: dict[str, Any]) -> str:
        return f"{self.path}: [{i}] (id {_named(sample['id'])})"

    def example(self, split: str, index: int, notes: Counter[str]) -> Example | None:
        """Sample `index`; None if it has no image or no whole pair of question and answer.

        Raises:
            UserError: the image is missing or damaged, or a text cannot be used (`checks`).
        """
        self.size(split)
        i, sample = self._samples[index]
        if sample.get("image") is None:
            notes["samples without an image: left out"] += 1
            return None
        start, turns = turns_of(sample["conversations"])
        if not turns:
            notes["chats without a whole question-answer pair: left out"] += 1
            return None
        for j, text in enumerate((text for turn in turns for text in (turn.question, turn.answer)), start):
            check_text(text, f"{self._where(i, sample)}.conversations[{j}].value", None)  # training cuts what is too long
        if 2 * len(turns) != len(sample["conversations"]):
            notes["chats cut to whole question-answer pairs"] += 1
        name, path = self._find(sample["image"], f"{self._where(i, sample)}.image", notes)
        data, height, width = image_bytes(path, notes)
        return Example(hashed_id(str(sample["id"]), sample["image"]), name, height, width, data, turns=turns)

    def _find(self, name: str, where: str, notes: Counter[str]) -> tuple[str, Path]:
        """(name, file) of an image; one of the same stem if only its suffix is another."""
        try:
            return name, self._folders.find(name, where)
        except UserError as missing:
            for suffix in _SUFFIXES:
                try:
                    other = str(PurePosixPath(name).with_suffix(suffix))
                    path = self._folders.find(other, where)
                except (UserError, ValueError):  # with_suffix: the name is empty
                    continue
                notes["images whose suffix is not the one in the JSON"] += 1
                return other, path
            raise missing


def _named(key: int | str) -> str:
    """A sample's id for a message."""
    return str(key) if isinstance(key, int) else listed([key])


def _check(sample: Any, where: str) -> None:
    """Raises a UserError unless the sample has an id, turns of human and gpt, and at most one image."""
    where = f"{where} (id {_named(field(sample, 'id', (int, str), where))})"
    if sample.get("image") is not None:
        field(sample, "image", str, where)
    turns = field(sample, "conversations", list, where)
    for j, turn in enumerate(turns):
        spot = f"{where}.conversations[{j}]"
        if field(turn, "from", str, spot) not in ("human", "gpt"):
            raise UserError(f"{spot}.from: expected 'human' or 'gpt', got {quoted(turn['from'])}")
        field(turn, "value", str, spot)
    placeholders = sum(turn["value"].count(IMAGE) for turn in turns if turn["from"] == "human")
    if placeholders > 1 and sample.get("image") is not None:
        raise UserError(f"{where}.conversations: {IMAGE} occurs {placeholders} times; a sample has one image")
