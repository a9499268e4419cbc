"""Keys and marks of media that are not read are found; names and texts that only look like them are not."""

import pytest
from PIL import Image

from cumo_model.data.media import OTHER_SUFFIXES, picture_suffixes, unread_mark, unread_media
from cumo_model.data.records import record_problem

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
    {"photos": ["b/a"]},
    {"video": "v_MzN4YWJ0Yw1"},
    {"videos": ["a.mp4"]},
    {"VIDEO_PATH": "a"},
    {"frames": ["1.jpg", "2.jpg"]},
    {"audio": "a.wav"},
    {"audios": ["x/a"]},
    {"media": [{"type": "image", "path": "a"}]},
    {"target_image": "b.png"},
    {"left_img": {"path": "b.JPG"}},
    {"file_name": "a.jpg"},
    {"file": "x/a.mp4"},
    {"download": "https://host/a.webp?size=3"},
    {"path": "data:image/png;base64,iVBORw0KGgo="},
    {"link": "data:image/png;base64,iVBORw0KGgo="},
    {"screenshot": "a/b.jpg"},
    {"thumbnail": "a/b.jpg"},
    {"image_thumbnail": "a/b.jpg"},
    {"figure": "a/b.jpg"},
    {"rgb": "a/b.png"},
    {"depth": "a/b.tif"},
    {"clips": ["a/b.mp4"]},
    {"gif": "a/b.gif"},
    {"mp4": "a/b.mp4"},
    {"scan": "a/b.tiff"},
    {"page": "a/b.jpg"},
    {"document": "a/b.jpg"},
    {"attachments": [{"kind": "x", "place": "a/b.jpg"}]},
    {"multimodal": {"inner": ["a/b.jpg"]}},
    {"content": [{"type": "image_url", "image_url": {"url": "https://host/a"}}]},
    {"speech": "a/b.wav"},
    {"voice": "a/b.mp3"},
    {"before": "a/b.jpg"},
    {"input_image": "sub/dir/000123"},
    {"query_image": "sub/dir/000123"},
    {"original_image": "sub/dir/000123"},
    {"left_image": "sub/dir/000123"},
    {"image_right": "sub\\000123"},
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
    "image_sizes": [3, 4],
    "image_source": "flickr",
    "image_folder": "coco",
    "num_images": 2,
    "has_images": True,
    "image_data": True,
    "video_length": 3.5,
    "Images": [],
    "Video": None,
    "Audio": "",
    "model": "gpt-4",
    "file": "train_3.json",
    "page": "https://host/page.html",
    "task": "image captioning",
    "imagination": "vivid",
    "media": "twitter",
    "visual": "no",
    "visuals": "https://twitter.com/a/1",
    "picture": "none",
    "photo": "n/a",
    "images": ["none", None],
    "video": "mp4",
    "audio": "no",
    "frames": [1, 2],
    "movie": {"name": "Heat", "year": 1995},
    "movie_name": "Heat",
    "url": "http://x/y.jpg",
    "link": "http://x/y.mp4",
    "coco_url": "http://images.cocodataset.org/train2017/1.jpg",
    "meta": {"source": "http://x/y.jpg", "tags": ["image", "a/b"]},
    "image_caption": "a photo of cat.jpg",
    "image_size": "336/336",
    "has_image": "yes/no",
    "comment": "see a.jpg",
    "domain": "x.com",
}


def test_other_keys_are_free():
    for key, value in HARMLESS.items():
        assert unread_media({key: value}) is None, key


def test_beside_pictures_other_keys_may_say_where_they_are_from():
    used = ["a.png", "b.png"]
    free = {
        "image_url": "https://host/a",
        "image_path": "/data/a.png",
        "image_paths": ["x/a.png", "https://host/b.jpg?size=3"],
        "input_image": "x\\b.png",
        "picture_url": "https://host/download?id=3",
        "images": ["x/a.png", "x/b.png"],
        "image_1": "a.png",
        "coco_url": "https://host/c.jpg",
        "image_source": "x/c.png",
        "image_base64": "iVBORw0KGgo=",
        "mask": "c.png",
        "file": "c.png",
        "frames": [1, 2],
        "media": "twitter",
    }
    assert unread_media(free, used) is None
    assert unread_media({"image_url": "https://host/a%20b.jpg"}, ["a b.jpg"]) is None
    for fields in (
        {"images": ["a.png"]},
        {"images": ["a.png", "c.png"]},
        {"image_2": "c.png"},
        {"image_path": "x/c.png"},
        {"image_url": "https://host/c.png"},
        {"input_image": "sub/000123"},
        {"media": [{"type": "image", "path": "c.png"}]},
        {"video": "a.mp4"},
        {"clip": "a.mp4"},
        {"voice": "a.wav"},
        {"pixel_values": [0]},
    ):
        assert unread_media(fields, used) is not None, fields


MARKS = {
    "<video>\nwhat?": "<video>",
    "what?\n<video>": "<video>",
    "First.\n<video>\nWhat is it?": "<video>",
    "what? <audio>": "<audio>",
    "Describe the clip. <video>": "<video>",
    "这是什么<video>": "<video>",
    "<Image>\nwhat?": "<Image>",
    "<IMAGE> what?": "<IMAGE>",
    "< image >what?": "< image >",
    "<image >": "<image >",
    "<image_1> or <image_2>?": "<image_1>",
    "Compare <image_1> and <image_2>": "<image_2>",
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
    "<|vision_start|><|image_pad|>": "<|vision_start|>",
    "<|AUDIO|>": "<|AUDIO|>",
    "[IMG]what?": "[IMG]",
    "Picture 1: <img>a.png</img> what?": "<img>",
    "Audio 1: <audio>\nWhat is said in it?\nBe brief.": "<audio>",
    "Frame1: <frame>\nFrame2: <frame>\nwhat?": "<frame>",
    "<image> and <video>": "<video>",
    "<image><video>\nwhat?": "<video>",
    '<video>\nAnswer as JSON: {"answer": 1}': "<video>",
}
SPELLINGS = (
    "<image/>,<image />,<img/>,<video/>,<vid>,<frame>,<FRAME>,<speech>,<sound>,<image:1>,<image.1>,"
    "<__media__>,<|vision_start|>,<|vision_pad|>,<fake_token_around_image>,[image],</image>,[Video 1]"
).split(",")
MARKS |= {form.format(mark): mark for mark in SPELLINGS for form in ("{}\nwhat?", "what?\n{}", "{}")}


@pytest.mark.parametrize("text, mark", MARKS.items(), ids=MARKS)
def test_a_mark_of_another_medium_is_found(text, mark):
    assert unread_mark(text) == mark


PAGE = "<html><body><img><video></video></body></html>"
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
    "what does List<Image> hold?",
    "sort a List<Image>",
    "Map<String, Video>",
    "std::unique_ptr<Image> img",
    "std::unique_ptr<Image>",
    "Vec<Image>",
    "let a = Vec::<Image>",
    "const [video, setVideo] = useState<Video>(null)",
    f"{PAGE} what does this do",
    f"what does this do\n{PAGE}",
    "fix my html: <div><img></div>",
    "<body>\n<video>\n</body>",
    "<video>\nYour browser is too old.\n</video>",
    "export default () => {\n  return (\n    <Image />\n  );\n}",
    "<View>\n  <Image />\n</View>\nwhy is it empty?",
    "[video]\nbitrate = 3\n\n[audio]\nrate = 4",
    "![image](https://host/a)\nwhat?",
    "[image](https://host/a) is a link",
    "What does <video> do in HTML?",
    "difference between <audio> and <video>?",
    "What is the difference between <audio> and <video>",
    "<audio> or <video>, which came first?",
    "What does <image_token> stand for?",
    "ffmpeg -i <video>",
    "tokens: Sony, <IMAGE>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_other_text_holds_no_mark(text):
    assert unread_mark(text) is None


def _record(question, answer="red", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": 1, "conversations": turns, **more}


OCR = "<image>\nProvide a one-sentence caption.\nReference OCR token: "


@pytest.mark.parametrize("tokens", ["<IMAGE>, [VIDEO], Sony", "Sony, [VIDEO]", "Sony <IMAGE>", "[IMG]"])
def test_words_read_from_a_picture_are_text(tokens):
    assert record_problem(_record(OCR + tokens, image="a.jpg")) is None
    assert record_problem(_record(f"<video>\n{OCR}{tokens}", image="a.jpg")) is not None


def test_at_the_end_of_a_question_without_a_picture_a_mark_stands_for_one():
    assert "holds <IMAGE>" in record_problem(_record("Reference OCR token: Sony <IMAGE>"))
    assert record_problem(_record("<image>\nReference OCR token: Sony <IMAGE>", image="a.jpg")) is None


@pytest.mark.parametrize(
    "answer",
    ["It replaces the <image_token> token", "<|image_pad|> is Qwen's", "<im_start>assistant", "<video>"],
)
def test_answers_may_hold_any_mark_but_the_read_one(answer):
    assert record_problem(_record("what?", answer)) is None
    assert "must not hold <image>" in record_problem(_record("what?", f"{answer} <image>"))


def test_where_a_medium_is_named_a_mark_in_a_sentence_is_one_too():
    question = "What is <video> about, in a word?"
    assert record_problem(_record(question, url="http://x/page")) is None
    assert "holds <video>" in record_problem(_record(question, url="http://x/y.mp4"))
    assert "holds <img>" in record_problem(_record("In <img> I see what?", image="a.png"))


def test_picture_suffixes_are_what_pillow_opens():
    Image.init()
    known = {name for name, form in Image.registered_extensions().items() if form in Image.OPEN}
    wanted = "jpg jpeg jpe jfif png apng webp gif bmp tif tiff avif heic jp2 ppm tga ico".split()
    assert picture_suffixes() >= {f".{name}" for name in wanted}
    assert picture_suffixes() - {".avif", ".heic", ".heif", ".jxl"} <= known
    assert not picture_suffixes() & {*OTHER_SUFFIXES, ".pdf", ".eps", ".h5", ".json", ".txt"}
