import logging
import os

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from shared_core import InputError
from shared_core.datasets import class_folders, image_folder


def picture(path, grey=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 3), grey).save(path)


@pytest.fixture
def labelled(tmp_path):
    for split in ("train", "val"):
        for grey, name in enumerate(("cat", "dog")):
            picture(tmp_path / split / name / "1.png", grey)
    return tmp_path


def test_class_folders_in_train_and_val(labelled):
    picture(labelled / "train" / "dog" / "deeper" / "2.JPEG", 1)
    splits = image_folder(labelled)
    assert isinstance(splits, DatasetDict)
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "val": 2}
    for split in splits.values():
        assert split.features["label"].names == ["cat", "dog"]
        for row in split:
            assert np.asarray(row["image"]).max() == row["label"]
            assert os.path.samefile(
                os.path.dirname(row["path"]).removesuffix("/deeper"),
                os.path.dirname(row["path"]).removesuffix("/deeper"),
            )
            assert split.features["label"].int2str(row["label"]) in row["path"]
    assert class_folders(labelled / "val")["label"][:] == splits["val"]["label"][:]


def test_unlabelled_images_of_a_folder_and_those_below_it_in_the_order_of_their_paths(tmp_path):
    for grey, name in enumerate(("a.png", "b/c/d.bmp", "b/e.webp", "f.tiff")):
        picture(tmp_path / name, 10 * grey)
    dataset = image_folder(tmp_path)
    assert isinstance(dataset, Dataset)
    assert set(dataset.features) == {"image", "path"}
    assert [os.path.relpath(path, tmp_path) for path in dataset["path"]] == [
        "a.png",
        "b/c/d.bmp",
        "b/e.webp",
        "f.tiff",
    ]
    assert [round(np.asarray(image).mean() / 10) for image in dataset["image"]] == [0, 1, 2, 3]


def test_links_are_followed_and_a_circle_ends(tmp_path):
    picture(tmp_path / "disk" / "a.png")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(folder)
    assert len(image_folder(folder)) == 1


def test_other_files_are_skipped_and_counted_and_hidden_ones_passed_over(tmp_path, caplog):
    for name in ("a.png", "b.png", ".hidden.png", ".git/c.png"):
        picture(tmp_path / name)
    for name in ("notes.txt", "labels.csv", ".DS_Store"):
        (tmp_path / name).touch()
    with caplog.at_level(logging.WARNING):
        dataset = image_folder(tmp_path)
    assert len(dataset) == 2
    assert dataset.info.description == f"2 images in {tmp_path}; 2 other files skipped"
    assert caplog.messages == [dataset.info.description]


def test_a_missing_folder_a_file_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: there is no such folder"):
        image_folder(tmp_path / "nowhere")
    (tmp_path / "file.png").touch()
    with pytest.raises(InputError, match=r"file\.png: is a file, expected a folder"):
        image_folder(tmp_path / "file.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: holds no image: expected \.bmp, \.gif"):
        image_folder(tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").touch()
    with pytest.raises(InputError, match=r"empty: holds no image, only 1 files of other kinds"):
        image_folder(tmp_path / "empty")


def test_unreadable_images_are_named_all_at_once(tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "zero.png").touch()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match="3 unreadable images") as caught:
        image_folder(tmp_path)
    for name in ("text.jpg (no image, or damaged)", "zero.png", "dangling.png (No such file or directory)"):
        assert name in str(caught.value)
    assert "good.png" not in str(caught.value)
    assert len(image_folder(tmp_path, check=False)) == 4


def test_splits_that_differ_in_classes_are_named_with_the_classes(labelled):
    picture(labelled / "train" / "bird" / "1.png")
    with pytest.raises(InputError, match=r"val: lacks 1 of the class folders that .*train has: bird"):
        image_folder(labelled)
    picture(labelled / "val" / "bird" / "1.png")
    picture(labelled / "val" / "cow" / "1.png")
    with pytest.raises(InputError, match=r"train: lacks 1 of the class folders that .*val has: cow"):
        image_folder(labelled)


def test_a_class_without_images_and_a_split_without_classes_are_named(labelled):
    (labelled / "train" / "cat" / "1.png").unlink()
    with pytest.raises(InputError, match=r"train/cat: holds no image"):
        image_folder(labelled)
    with pytest.raises(InputError, match=r"train/dog: has no class folders"):
        class_folders(labelled / "train" / "dog")
