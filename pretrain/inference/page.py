"""A web page on which to type a prompt and watch the tokens arrive, served to this machine only.

The server listens on 127.0.0.1, answers to local host names only, and refuses forms that another site could post.
"""

import json
import threading
from collections.abc import Iterator
from dataclasses import asdict

from flask import Flask, Response, render_template, request

from pretrain.inference.sampling import Sampling
from pretrain.inference.text_generator import TextGenerator

HOST = "127.0.0.1"
DEFAULTS = asdict(Sampling())


def make_app(generator: TextGenerator) -> Flask:
    """The page at /, and POST /write: {"prompt", "tokens", "stops", keys of Sampling} → lines {"text"}, {"speed"}."""
    app = Flask(__name__, template_folder=".")
    app.config["TRUSTED_HOSTS"] = [HOST, "localhost"]  # refuses a name that another site resolves to this machine
    one_at_a_time = threading.Lock()

    @app.get("/")
    def page() -> str:
        return render_template("page.html", **DEFAULTS)

    @app.post("/write")
    def write() -> Response | tuple[str, int]:
        asked = request.get_json()  # refuses any other content type: browsers ask before they send JSON elsewhere
        try:
            sampling = Sampling(**{key: type(default)(asked.get(key, default)) for key, default in DEFAULTS.items()})
            prompt, tokens, stops = str(asked["prompt"]), int(asked.get("tokens", 200)), list(asked.get("stops", []))
        except (KeyError, TypeError, ValueError) as error:
            return str(error), 400

        def lines() -> Iterator[str]:
            with one_at_a_time:
                for text in generator.stream(prompt, tokens, sampling, stops):
                    yield json.dumps({"text": text}) + "\n"
                yield json.dumps({"speed": generator.speed}) + "\n"

        return Response(lines(), mimetype="application/x-ndjson")

    return app


def serve(generator: TextGenerator, port: int) -> None:
    """Serve the page until interrupted."""
    make_app(generator).run(HOST, port)
