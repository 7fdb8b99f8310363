"""The page to type into: what it streams, whom it answers, and how it looks and behaves in a browser."""

import json
import logging
import socket
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from data.train_tokenizer import train_tokenizer
from pretrain import generate as command
from pretrain.inference.page import HOST, make_app, serve
from pretrain.inference.sampling import Sampling
from pretrain.inference.text_generator import TextGenerator
from tests.pretrain.test_generate import SIZES, small

NAME = "mine, step 700"


@pytest.fixture(scope="module")
def generator(root, tmp_path_factory):
    texts = [file.read_text() for file in sorted((root / "models").glob("*.py"))]
    file = tmp_path_factory.mktemp("tokenizer") / "t.model"
    return TextGenerator(small(kv_heads=2), train_tokenizer(texts, file, SIZES["vocab_size"], seed=0))


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(generator, port):
    """The address of the page, served as the command does."""
    threading.Thread(target=serve, args=(make_app(generator, NAME), port), daemon=True).start()
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                break
        time.sleep(0.1)
    return f"http://{HOST}:{port}"


def lines_of(answer) -> tuple[str, dict]:
    """The text of an answer, and its last line."""
    lines = [json.loads(line) for line in answer.splitlines()]
    return "".join(line.get("text", "") for line in lines), lines[-1]


def test_the_page_streams_what_the_generator_writes(generator):
    client = make_app(generator, NAME).test_client()
    asked = {"prompt": "self", "tokens": 20, "temperature": 0.9, "seed": 5, "stops": ["\n\n"]}
    text, last = lines_of(client.post("/write", json=asked).text)
    assert text == "".join(generator.stream("self", 20, Sampling(0.9, seed=5), ["\n\n"]))
    assert "tokens/s" in last["speed"] and last["seed"] == 5


def test_each_request_without_a_seed_gets_another_text_and_says_its_seed(generator):
    client = make_app(generator, NAME).test_client()
    asked = {"prompt": "self", "tokens": 20, "seed": None}
    answers = [lines_of(client.post("/write", json=asked).text) for _ in range(2)]
    assert answers[0][0] != answers[1][0]
    for text, last in answers:
        assert text == "".join(generator.stream("self", 20, Sampling(seed=last["seed"])))


def test_the_page_is_for_this_machine_and_refuses_what_is_wrong(generator):
    client = make_app(generator, NAME).test_client()
    assert HOST == "127.0.0.1"
    assert client.get("/", base_url="http://evil.example").status_code == 400
    assert client.post("/write", data='{"prompt": "x"}', content_type="text/plain").status_code == 415
    assert client.post("/write", json=["x"]).status_code == 400
    refused = client.post("/write", json={"prompt": "x", "top_p": 2})
    assert refused.status_code == 400 and "top_p=2.0 must be above 0" in refused.text


def test_the_page_begins_with_the_options_of_the_command(generator):
    page = make_app(generator, "<mine>", Sampling(0.25, top_k=7, seed=3)).test_client().get("/").text
    assert 'value="0.25"' in page and 'value="7"' in page and "<h1>&lt;mine&gt;</h1>" in page
    assert 'id="seed" type="number" min="0" placeholder="random"' in page


def test_pieces_arrive_as_they_are_made_and_nothing_is_logged(server, generator, monkeypatch, capsys, caplog):
    gate = threading.Event()

    def stream(*_):
        yield "first"
        gate.wait(20)
        yield "last"

    monkeypatch.setattr(generator, "stream", stream)
    request = urllib.request.Request(f"{server}/write", b'{"prompt": "x"}', {"Content-Type": "application/json"})
    with caplog.at_level(logging.INFO), urllib.request.urlopen(request, timeout=20) as answer:
        assert json.loads(answer.readline()) == {"text": "first"}  # while the second is not there yet
        gate.set()
        assert json.loads(answer.readline()) == {"text": "last"}
    assert caplog.text == "" and "WARNING" not in "".join(capsys.readouterr())


def test_a_port_in_use_is_named(generator, port):
    with socket.socket() as other:
        other.bind((HOST, port))
        other.listen()
        with pytest.raises(ValueError, match=f"--port {port} is used by another program"):
            serve(make_app(generator, NAME), port)


@pytest.mark.parametrize(
    ("path", "name"),
    [("runs/mine/checkpoints/step-00000700", "mine, step 700"), ("exported/llama-3.2-1b", "llama-3.2-1b")],
)
def test_the_command_names_the_model_and_prints_no_text_after_the_page(path, name, generator, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(command, "_load", lambda _: (Path(path), generator, Sampling()))
    monkeypatch.setattr("pretrain.inference.page.serve", lambda app, port: served.append((app, port)))
    command.main(["runs/mine", "--page", "--port", "8123"])
    ((app, port),) = served
    assert f"<h1>{name}</h1>" in app.test_client().get("/").text and port == 8123
    assert capsys.readouterr() == ("", "")


def test_the_form_starts_with_all_options_of_the_command(generator, monkeypatch):
    pages = []
    monkeypatch.setattr(command, "_load", lambda _: (Path("exported/a"), generator, Sampling(0.25)))
    monkeypatch.setattr("pretrain.inference.page.serve", lambda app, _: pages.append(app.test_client().get("/").text))
    given = ["--prompt", "\nx </textarea>", "--tokens", "7", "--stop", "\n\n", "--stop", "</script>", "--seed", "0"]
    command.main(["model", "--page", *given])
    command.main(["model", "--page"])
    assert "autofocus>\n\nx &lt;/textarea&gt;</textarea>" in pages[0]  # HTML drops the first line end
    assert 'id="tokens" type="number" min="1" value="7"' in pages[0] and 'value="0.25"' in pages[0]
    assert 'id="seed" type="number" min="0" placeholder="random" value="0"' in pages[0]
    assert r'stops: ["\n\n", "\u003c/script\u003e"] }' in pages[0] and 'id="stops"' in pages[0]
    assert "autofocus>\n</textarea>" in pages[1] and 'placeholder="random">' in pages[1]
    assert "stops: [] }" in pages[1] and 'id="stops"' not in pages[1]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_tokens_arrive_in_a_browser(server, generator, browser, width, scheme):
    from playwright.sync_api import TimeoutError

    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server)
    assert page.title() == page.text_content("h1") == NAME
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    page.fill("#prompt", "class A")
    page.fill("#tokens", "60")
    page.fill("#seed", "7")
    page.press("#prompt", "Control+Enter")
    page.wait_for_function("document.getElementById('text').textContent.length > 5")
    page.wait_for_selector("#write:enabled")
    assert page.text_content("#prompted") == "class A"
    assert page.text_content("#text") == "".join(generator.stream("class A", 60, Sampling(seed=7)))
    assert "tokens/s, seed 7" in page.text_content("#speed")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.fill("#tokens", "1000000")

    def stopped(seed):
        page.fill("#seed", str(seed))
        page.click("#write")
        try:
            page.click("#stop", timeout=2000)
        except TimeoutError:  # the text came to its end before
            page.wait_for_selector("#write:enabled")
            return False
        return True

    assert any(stopped(seed) for seed in range(20))
    page.wait_for_function("document.getElementById('speed').textContent === 'stopped'")
    page.fill("#tokens", "5")  # the model is free again
    page.click("#write")
    page.wait_for_function("document.getElementById('speed').textContent.includes('tokens')")
    assert problems == []
