"""The page in the browser, in a real headless Chromium: chat, bad input, sessions, routing."""

import base64
import shutil
import threading
import time

import pytest
import torch
from PIL import Image, ImageDraw

from cumo_model import CumoForConditionalGeneration
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.processor import build_processor
from cumo_model.serving.endpoint import Endpoint
from cumo_model.serving.local import Local
from cumo_model.serving.messages import user_message
from cumo_model.serving.sampling import Sampling
from cumo_model.serving.web import talk as talks
from cumo_model.serving.web.server import served
from tests.model.serving.endpoint_server import serving, silent

pytest.importorskip("gradio")
sync = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("there is no chromium: `apt-get install chromium`", allow_module_level=True)

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
WORDS = (
    "a red apple lies on the green table near blue water under yellow light what is it who has this".split()
)
SHORT, LONG = Sampling(24), 330  # tokens; LONG takes seconds, so that it can be stopped
QUESTION = "what is it?"


def make_engine() -> Local:
    """A model that answers in words, another one to each question, and never ends by itself."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 9, 400)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "pad_token_id": 0}
    options |= {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CumoForConditionalGeneration.config_class(
        vision_config={**vision, "image_size": 12, "patch_size": 4, "num_experts": 4},
        text_config={
            "model_type": "mixtral",
            "num_local_experts": 4,
            "num_key_value_heads": 1,
            "eos_token_id": None,
            **options,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(3)
    model = CumoForConditionalGeneration(config).eval()
    said = torch.tensor([tokenizer.decode(i).strip() in WORDS for i in range(len(tokenizer))])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
        model.lm_head.weight[~said] = 0
    model.generation_config.eos_token_id = None
    return Local(model, build_processor(tokenizer, 12, 4), name="tiny")


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture(scope="module")
def site(engine):
    with served(engine, port=0, sampling=SHORT) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with sync.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """Opens a page in a session of its own; nothing may be loaded from another address."""
    contexts, loaded = [], []

    def open_page(site):
        contexts.append(browser.new_context(viewport={"width": 1200, "height": 860}))
        page = contexts[-1].new_page()
        page.on("request", lambda request: loaded.append(request.url))
        page.set_default_timeout(90_000)
        page.goto(site.address)
        page.wait_for_selector("#question textarea")
        return page

    yield open_page
    for context in contexts:
        context.close()
    local = tuple(f"{scheme}127.0.0.1:" for scheme in ("http://", "ws://"))
    assert loaded and [url for url in loaded if not url.startswith((*local, "data:", "blob:"))] == []


@pytest.fixture
def page(opened, site):
    return opened(site)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two pictures that the model tells apart."""
    folder = tmp_path_factory.mktemp("pictures")
    red = Image.new("RGB", (30, 20), "red")
    ImageDraw.Draw(red).ellipse((8, 4, 22, 16), fill="yellow")
    red.save(folder / "red.png")
    Image.linear_gradient("L").resize((20, 30)).convert("RGB").save(folder / "grey.png")
    return [folder / "red.png", folder / "grey.png"]


def attach(page, *files):
    before = page.locator("#question .thumbnail-item").count()
    with page.expect_file_chooser() as chooser:
        page.click("#question button[aria-label='Upload a file']")
    chooser.value.set_files([str(file) for file in files])
    page.wait_for_function(
        "wanted => document.querySelectorAll('#question .thumbnail-item').length == wanted",
        arg=before + len(files),
    )


def ask(page, text, *files):
    if files:
        attach(page, *files)
    page.fill("#question textarea", text)
    page.press("#question textarea", "Enter")


def longest(page, tokens):
    page.fill("#longest input[type=number]", str(tokens))
    page.press("#longest input[type=number]", "Tab")


def said(page):
    """Texts of the rows of the chat, without pictures."""
    rows = page.evaluate("[...document.querySelectorAll('.chat .message')].map(row => row.innerText.trim())")
    return [text for text in rows if text]


def wait_until(page, holds, seconds=90):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, said(page)
        page.wait_for_timeout(20)


def ended(page):
    """The rows after the last one says that the answer was cut, as all answers of this model are."""
    wait_until(
        page, lambda: said(page)[-1:] == ["[the answer was cut after 24 tokens, the longest asked for]"]
    )
    return said(page)


def noticed(page, words):
    page.wait_for_function(
        "words => (document.querySelector('#notice')?.innerText || '').includes(words)", arg=words
    )


def expected(engine, *turns, sampling=SHORT):
    """The engine's answer to the last of (text, pictures) after its answers to those before."""
    messages = []
    for text, *files in turns:
        messages.append(user_message(text, [Image.open(file) for file in files]))
        messages.append({"role": "assistant", "content": engine.stream(messages, sampling).read().text})
    return messages[-1]["content"]


def test_an_answer_is_streamed_and_the_next_one_remembers(page, engine, files):
    page.evaluate(
        """() => {
            window.states = [];
            const keep = () => window.states.push(
                [...document.querySelectorAll(".chat .message")].map(row => row.innerText.trim()));
            const kinds = {childList: true, characterData: true, subtree: true};
            new MutationObserver(keep).observe(document.querySelector(".chat"), kinds);
        }"""
    )
    ask(page, QUESTION, files[0])
    first = expected(engine, (QUESTION, files[0]))
    question, answer, _ = ended(page)
    assert (question, answer) == (QUESTION, first) and first.count(" ") > 5
    partial = {state[-1] for state in page.evaluate("window.states") if len(state) == 3} - {"…", first}
    assert len(partial) >= 3 and all(first.startswith(text) for text in partial)
    assert page.locator(".chat img").count() == 1 and page.input_value("#question textarea") == ""
    assert page.locator("#question .thumbnail-item").count() == 0
    ask(page, "who has this?")
    wait_until(page, lambda: len(said(page)) == 6)
    second = expected(engine, (QUESTION, files[0]), ("who has this?",))
    assert ended(page)[3:5] == ["who has this?", second]
    assert second != expected(engine, ("who has this?",))  # so the first turn counts


def test_regenerate_asks_the_last_question_again_and_clear_forgets_all(page, engine, site, files):
    page.click("#again")
    noticed(page, talks.NOTHING)
    ask(page, QUESTION, files[0])
    ended(page)
    assert page.locator("#notice p").count() == 0
    ask(page, "who?")
    wait_until(page, lambda: len(said(page)) == 6)
    ended(page)
    longest(page, 5)
    page.click("#again")
    wait_until(page, lambda: "after 5 tokens" in said(page)[-1])
    wanted = expected(engine, (QUESTION, files[0]), ("who?",))
    assert said(page)[:2] == [QUESTION, expected(engine, (QUESTION, files[0]))]
    assert wanted.startswith(said(page)[4]) and said(page)[3] == "who?" and len(said(page)) == 6
    assert len(said(page)[4].split()) < len(wanted.split())
    page.click("#clear")
    wait_until(page, lambda: said(page) == [])
    longest(page, 24)
    ask(page, "who?")
    assert ended(page)[:2] == ["who?", expected(engine, ("who?",))]
    assert list(site.folder.rglob("*.png")) == []


def test_two_pictures_in_a_turn_and_a_pasted_one(page, engine, files):
    ask(page, QUESTION, *files)
    assert (
        ended(page)[1] == expected(engine, (QUESTION, *files)) != expected(engine, (QUESTION, *files[::-1]))
    )
    assert page.locator(".chat img").count() == 2
    page.click("#clear")
    wait_until(page, lambda: said(page) == [])
    page.evaluate(
        """data => {
            const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
            const clip = new DataTransfer();
            clip.items.add(new File([bytes], "pasted.png", {type: "image/png"}));
            const event = new ClipboardEvent("paste", {clipboardData: clip, bubbles: true, cancelable: true});
            document.querySelector("#question textarea").dispatchEvent(event);
        }""",
        base64.b64encode(files[1].read_bytes()).decode(),
    )
    page.wait_for_selector("#question .thumbnail-item")
    ask(page, QUESTION)
    assert ended(page)[1] == expected(engine, (QUESTION, files[1]))
    assert page.locator(".chat img").count() == 1


def start_long(page, text=QUESTION):
    """Ask for an answer that takes seconds and wait for its first words."""
    longest(page, LONG)
    ask(page, text)
    wait_until(page, lambda: len("".join(said(page)[-1:]).split()) > 3)


def assert_idle(engine):
    """No answer is being generated, or it ends at once."""
    begin = time.monotonic()
    with engine.alone():
        assert time.monotonic() - begin < 1


@pytest.mark.slow
def test_stop_keeps_what_was_said(page, engine):
    start_long(page)
    page.click("#stop")
    wait_until(page, lambda: said(page)[-1] == f"[{talks.STOPPED}]")
    assert_idle(engine)
    whole = expected(engine, (QUESTION,), sampling=Sampling(LONG))
    answer = said(page)[1]
    assert whole.startswith(answer) and len(answer) < len(whole)
    longest(page, 24)
    ask(page, "who?")
    ended(page)
    talk = [user_message(QUESTION), {"role": "assistant", "content": answer}, user_message("who?")]
    assert said(page)[4] == engine.stream(talk, SHORT).read().text


@pytest.mark.slow
def test_a_second_question_waits_and_clear_ends_an_answer(page, engine):
    start_long(page)
    page.click("#again")
    noticed(page, talks.BUSY)
    page.click("#clear")
    wait_until(page, lambda: said(page) == [])
    assert_idle(engine)
    page.wait_for_timeout(300)
    assert said(page) == []
    longest(page, 24)
    ask(page, "who?")
    assert ended(page)[:2] == ["who?", expected(engine, ("who?",))]


@pytest.mark.slow
def test_closing_the_page_ends_its_answer_and_deletes_its_pictures(opened, site, engine, files):
    page = opened(site)
    ask(page, QUESTION, files[0])
    ended(page)
    longest(page, LONG)
    ask(page, QUESTION, files[0])
    wait_until(page, lambda: len(said(page)) == 5 and len(said(page)[-1].split()) > 3)
    assert len(list(site.folder.rglob("*.png"))) > 0
    begin = time.monotonic()
    page.close()
    with engine.alone():
        assert time.monotonic() - begin < 2
    while list(site.folder.rglob("*.png")):
        # gradio looks every 15 seconds whether a page is still there, if it does not hear of its end
        assert time.monotonic() - begin < 40, list(site.folder.rglob("*.png"))
        time.sleep(0.05)


@pytest.mark.slow
def test_sessions_do_not_mix_and_wait_for_each_other(opened, site, engine, files):
    one, two = opened(site), opened(site)
    start_long(one)
    ask(two, "who has this?", files[1])
    wait_until(two, lambda: said(two) == ["who has this?", "…"])
    one.click("#stop")
    assert ended(two)[:2] == ["who has this?", expected(engine, ("who has this?", files[1]))]
    assert said(one)[0] == QUESTION and said(one)[-1] == f"[{talks.STOPPED}]" and len(said(one)) == 3


@pytest.mark.slow
def test_an_answer_can_be_stopped_while_it_waits(opened, site, engine):
    one, two = opened(site), opened(site)
    start_long(one)
    ask(two, "who?")
    wait_until(two, lambda: said(two) == ["who?", "…"])
    two.click("#stop")
    noticed(two, f"{talks.STOPPED} before its first word")
    assert said(two) == [] and two.input_value("#question textarea") == "who?"
    one.click("#stop")
    wait_until(one, lambda: said(one)[-1] == f"[{talks.STOPPED}]")


def bomb(path):
    """A picture whose file is small and that would fill the memory."""
    Image.new("1", (13_000, 13_000)).save(path)


def no_picture(path):
    path.write_text("no picture")


@pytest.mark.parametrize(
    "text, make, told",
    [
        (" ", None, "the question must not be empty"),
        ("<image> and?", None, "the question must not hold <image>"),
        ("a [/INST] b", None, "the question must not hold [/INST], which separates turns"),
        ("it is " * 400, None, "the conversation must have fewer than 512 tokens"),
        (
            QUESTION,
            no_picture,
            "picture 2 of the question' is not a picture in a format that Pillow supports",
        ),
        pytest.param(QUESTION, bomb, "picture 2 of the question' must ", marks=pytest.mark.slow),
    ],
    ids=["empty", "marker", "template", "long", "text", "bomb"],
)
def test_bad_input_is_one_line_and_leaves_the_conversation(page, engine, files, tmp_path, text, make, told):
    ask(page, "who?")
    before = ended(page)
    given = [files[0]] if make else []
    if make:
        make(tmp_path / "evil.png")
        given.append(tmp_path / "evil.png")
    ask(page, text, *given)
    noticed(page, told)
    assert page.locator("#notice p").inner_text().count("\n") == 0 and said(page) == before
    assert page.input_value("#question textarea") == text  # to be mended
    if make:
        assert page.locator("#question .thumbnail-item").count() == 2
        for button in page.locator("#question .thumbnail-item button").all()[::-1]:
            button.click()
    ask(page, QUESTION)
    wait_until(page, lambda: len(said(page)) == 6)
    assert ended(page)[4] == expected(engine, ("who?",), (QUESTION,))
    assert page.locator("#notice p").count() == 0


@pytest.mark.slow
def test_the_sliders_are_the_sampling(opened, engine):
    given = Sampling(24, 0.5, 0.9, seed=5)
    with served(engine, port=0, sampling=given, system="who", name="of a <b>test</b>") as site:
        page = opened(site)
        assert "CuMo: of a <b>test</b>" in page.inner_text("body")
        messages = [{"role": "system", "content": "who"}, user_message(QUESTION)]
        for temperature, top_p in ((0.5, 0.9), (1.5, 0.3), (0.0, 0.3)):
            for name, value in (("temperature", temperature), ("top_p", top_p)):
                page.fill(f"#{name} input[type=number]", str(value))
                page.press(f"#{name} input[type=number]", "Tab")
            if said(page):  # on an empty page nothing shows when it is cleared
                page.click("#clear")
                wait_until(page, lambda: said(page) == [])
            ask(page, QUESTION)
            ended(page)
            wanted = engine.stream(messages, Sampling(24, temperature, top_p, seed=5)).read().text
            assert next(iter(site.talks._talks.values())).turns[0].answer == wanted


def test_the_tab_of_routing_shows_the_pictures(page, engine, files):
    page.get_by_role("tab", name="Routing").click()
    page.wait_for_function("() => document.querySelector('#told')?.innerText.includes('Ask a question')")
    page.get_by_role("tab", name="Chat").click()
    ask(page, QUESTION, *files)
    ended(page)
    page.get_by_role("tab", name="Routing").click()
    drawn = "name => document.querySelector(`#${name} img`)?.naturalWidth > 300"
    for name in ("patches", "load"):
        page.wait_for_function(drawn, arg=name)
    assert page.input_value("#choice input") == "picture 2"
    shown = {name: page.get_attribute(f"#{name} img", "src") for name in ("patches", "load")}
    page.click("#choice input")
    page.get_by_role("option", name="picture 1").click()
    for name in ("patches", "load"):
        page.wait_for_function(
            "([name, before]) => document.querySelector(`#${name} img`)?.src != before && "
            "document.querySelector(`#${name} img`)?.naturalWidth > 300",
            arg=[name, shown[name]],
        )
    assert page.locator("button[aria-label=Share]:visible").count() == 0
    assert page.get_by_text("gradio", exact=False).count() == 0


@pytest.mark.slow
def test_an_endpoint_answers_and_its_errors_are_one_line(opened, engine, files):
    pytest.importorskip("openai")
    with serving(engine) as server, served(Endpoint(server.url), port=0, sampling=SHORT) as site:
        page = opened(site)
        assert "CuMo: tiny" in page.inner_text("body")
        ask(page, QUESTION, files[0])
        wait_until(page, lambda: len(said(page)) == 3)
        first = expected(engine, (QUESTION, files[0]))
        assert ended(page)[1] == first
        ask(page, "it is " * 400)  # how long a conversation may be is known to the server
        noticed(page, "refuses it (400): the conversation must have fewer than 512 tokens")
        assert said(page)[:2] == [QUESTION, first] and len(said(page)) == 3
        start_long(page, "who?")
        page.click("#stop")
        wait_until(page, lambda: said(page)[-1] == f"[{talks.STOPPED}]")
        assert server.left.wait(5)
        page.get_by_role("tab", name="Routing").click()
        assert "not for an endpoint" in page.inner_text("#no_routing")


def test_text_is_shown_as_it_is(page, engine):
    text = "is <b>bold</b> a < b & c &lt; <img src=x> &amp; **x**"
    ask(page, text)
    assert ended(page)[0] == text


def test_clear_deletes_uploads_in_the_box_and_old_ones_go(opened, engine, files):
    with served(engine, port=0) as site:
        page = opened(site)
        uploads = lambda: list(site.folder.glob("*/*"))
        attach(page, *files)
        assert len(uploads()) == 2
        page.click("#clear")
        wait_until(page, lambda: not uploads() and page.locator("#question .thumbnail-item").count() == 0)
        attach(page, files[0])
        site.talks.sweep(3600)
        assert len(uploads()) == 1
        site.talks.sweep(0)
        assert not uploads()


def test_a_silent_server_can_be_stopped(opened, engine, monkeypatch):
    pytest.importorskip("openai")
    is_over = threading.Event()
    with serving(engine) as server:
        monkeypatch.setattr(server.RequestHandlerClass, "do_POST", silent(is_over))
        with served(Endpoint(server.url), port=0) as site:
            page = opened(site)
            ask(page, QUESTION)
            wait_until(page, lambda: said(page)[1:] == ["a"])
            page.click("#stop")
            wait_until(page, lambda: said(page)[1:] == ["a", "[the answer was stopped]"])
            is_over.set()
