"""Keys and marks of media that are not read are found; names and texts that only look like them are not."""

import pytest
from PIL import Image

from cumo_model.data.media import OTHER_SUFFIXES, picture_suffixes, unread_mark, unread_media

READ_BY_NOBODY = [
    {"images": ["a.png"]},
    {"Images": "a.png"},
    {"Image": "a.png"},
    {"IMAGE": "a.png"},
    {"img": "000001"},
    {"image_path": "a"},
    {"imagePath": "a.png"},
    {"imagepath": "a.png"},
    {"imgurl": "https://host/a"},
    {"image_url": {"url": "https://host/a"}},
    {"imageURL": "https://host/a"},
    {"image_file": "a"},
    {"image_filename": "a"},
    {"image_1": "a.png"},
    {"image_base64": "iVBORw0KGgo="},
    {"image_bytes": [1, 2]},
    {"pixel_values": [[0.0]]},
    {"picture": "a.png"},
    {"photos": ["a"]},
    {"video": "a"},
    {"videos": ["a.mp4"]},
    {"VIDEO_PATH": "a"},
    {"frames": ["1.jpg", "2.jpg"]},
    {"audio": "a.wav"},
    {"audios": ["a"]},
    {"media": [{"type": "image", "path": "a"}]},
    {"target_image": "b.png"},
    {"left_img": {"path": "b.JPG"}},
    {"file_name": "a.jpg"},
    {"file": "x/a.mp4"},
    {"url": "https://host/a.webp?size=3"},
    {"path": "data:image/png;base64,iVBORw0KGgo="},
]


@pytest.mark.parametrize("fields", READ_BY_NOBODY, ids=lambda fields: next(iter(fields)))
def test_a_medium_under_another_key_is_found(fields):
    assert f"under {next(iter(fields))!r}, which is not read" in unread_media(fields)


HARMLESS = {
    "image_id": "000001",
    "video_id": "v_1",
    "source": "coco/train2017/1.jpg",
    "dataset": "images",
    "height": 3,
    "width": 4,
    "image_size": [3, 4],
    "image_source": "flickr",
    "image_folder": "coco",
    "num_images": 2,
    "has_image": True,
    "video_length": 3.5,
    "images": [],
    "video": None,
    "audio": "",
    "model": "gpt-4",
    "file": "train_3.json",
    "url": "https://host/page.html",
    "task": "image captioning",
    "imagination": "a.png",
}


def test_other_keys_are_free():
    for key, value in HARMLESS.items():
        assert unread_media({key: value}) is None, key


def test_beside_pictures_other_keys_may_say_where_they_are_from():
    used = ["a.png", "b.png"]
    free = {"image_url": "https://host/a", "images": used, "coco_url": "https://host/a.jpg", "file": "c.png"}
    assert unread_media(free, used) is None
    for fields in ({"images": ["a.png"]}, {"image_2": "c.png"}, {"video": "a.mp4"}, {"pixel_values": [0]}):
        assert unread_media(fields, used) is not None, fields


MARKS = {
    "<video>\nwhat?": "<video>",
    "what? <audio>": "<audio>",
    "<Image>\nwhat?": "<Image>",
    "<IMAGE> what?": "<IMAGE>",
    "< image >what?": "< image >",
    "<image >": "<image >",
    "<image_1> or <image_2>?": "<image_1>",
    "<image1>": "<image1>",
    "<image 1>": "<image 1>",
    "<ImageHere>": "<ImageHere>",
    "<IMG_CONTEXT>": "<IMG_CONTEXT>",
    "<image_placeholder>": "<image_placeholder>",
    "<start_of_image>": "<start_of_image>",
    "<image_soft_token>": "<image_soft_token>",
    "<im_start><im_patch><im_end>": "<im_start>",
    "<|image|>what?": "<|image|>",
    "<|image_1|>what?": "<|image_1|>",
    "<|vision_start|><|image_pad|>": "<|image_pad|>",
    "<|AUDIO|>": "<|AUDIO|>",
    "[IMG]what?": "[IMG]",
    "Picture 1: <img>a.png</img> what?": "<img>",
    "<image> and <video>": "<video>",
}


@pytest.mark.parametrize("text, mark", MARKS.items(), ids=MARKS)
def test_a_mark_of_another_medium_is_found(text, mark):
    assert unread_mark(text, is_question=True) == mark


TEXTS = [
    "<image>\nwhat?",
    "what is in the image?",
    "why is `<video>` empty?",
    "```html\n<video>\n```",
    "<video>\n<source src='a.mp4'></video>",
    '<video src="a.mp4"> does not play',
    "how is the <video> tag used?",
    "run show.py <image_path> <n>",
    "<Image><image></Image> what?",
    "a <b and c> image",
    "<|im_start|>user",
    "List[Image] or [image]?",
    "<movies><movie>Heat</movie></movies>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_other_text_holds_no_mark(text):
    assert unread_mark(text, is_question=True) is None


def test_an_answer_may_name_elements_but_holds_no_placeholder():
    assert unread_mark("use <video> here [IMG]", is_question=False) is None
    assert unread_mark("as <image_1> shows", is_question=False) == "<image_1>"


def test_picture_suffixes_are_what_pillow_opens():
    Image.init()
    known = {name for name, form in Image.registered_extensions().items() if form in Image.OPEN}
    wanted = "jpg jpeg jpe jfif png apng webp gif bmp tif tiff avif heic jp2 ppm tga ico".split()
    assert picture_suffixes() >= {f".{name}" for name in wanted}
    assert picture_suffixes() - {".avif", ".heic", ".heif", ".jxl"} <= known
    assert not picture_suffixes() & {*OTHER_SUFFIXES, ".pdf", ".eps", ".h5", ".json", ".txt"}
