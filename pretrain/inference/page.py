"""A page to type a prompt into and watch the tokens arrive, served on this machine alone.

The server listens on 127.0.0.1, answers to local names only, and takes no form that another site could post.
"""

import json
import threading
from collections.abc import Iterator
from dataclasses import asdict

from flask import Flask, Response, render_template, request

from pretrain.inference.sampling import Sampling, Writer

HOST = "127.0.0.1"


def make_app(writer: Writer) -> Flask:
    """The page at /, and POST /write: {"prompt", "tokens", "stops", keys of Sampling} → lines {"text"}, {"speed"}."""
    app = Flask(__name__, template_folder=".")
    app.config["TRUSTED_HOSTS"] = [HOST, "localhost"]  # a name that another site makes point here is refused
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

        def pieces() -> Iterator[str]:
            with one_at_a_time:
                for text in writer.write(prompt, tokens, sampling, stops):
                    yield json.dumps({"text": text}) + "\n"
                yield json.dumps({"speed": writer.speed}) + "\n"

        return Response(pieces(), mimetype="application/x-ndjson")

    return app


def serve(writer: Writer, port: int) -> None:
    """Serve the page until interrupted."""
    make_app(writer).run(HOST, port)


DEFAULTS = asdict(Sampling())
