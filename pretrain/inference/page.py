"""A web page on which to type a prompt and watch the tokens arrive, served to this machine only.

The server listens on 127.0.0.1, answers to local host names only, and refuses forms that another site could post.
"""

import errno
import json
import secrets
import threading
from collections.abc import Iterator
from dataclasses import asdict

import waitress
from flask import Flask, Response, render_template, request

from pretrain.inference.sampling import Sampling
from pretrain.inference.text_generator import TextGenerator

HOST = "127.0.0.1"
LARGEST_SEED = 2**31
DEFAULTS = Sampling()


def make_app(generator: TextGenerator, name: str, defaults: Sampling = DEFAULTS) -> Flask:
    """The page at /, and POST /write.

    The latter takes {"prompt", "tokens", "stops", keys of Sampling}. Each request without a seed gets another one. The
    answer is lines {"text"}, and at the end {"speed", "seed"}.

    Args:
        name: of the model, for people.
        defaults: the values that the page begins with, except the seed.
    """
    app = Flask(__name__, template_folder=".")
    app.config["TRUSTED_HOSTS"] = [HOST, "localhost"]  # refuses a name that another site resolves to this machine
    one_at_a_time = threading.Lock()

    @app.get("/")
    def page() -> str:
        return render_template("page.html", name=name, **asdict(defaults))

    @app.post("/write")
    def write() -> Response | tuple[str, int]:
        asked = request.get_json()  # refuses any other content type: browsers ask before they send JSON elsewhere
        try:
            if asked.get("seed") is None:
                asked["seed"] = secrets.randbelow(LARGEST_SEED)
            values = {key: type(default)(asked.get(key, default)) for key, default in asdict(defaults).items()}
            sampling, prompt = Sampling(**values), str(asked["prompt"])
            tokens, stops = int(asked.get("tokens", 200)), list(asked.get("stops", []))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return str(error), 400

        def lines() -> Iterator[str]:
            with one_at_a_time:
                for text in generator.stream(prompt, tokens, sampling, stops):
                    yield json.dumps({"text": text}) + "\n"
                yield json.dumps({"speed": generator.speed, "seed": sampling.seed}) + "\n"

        return Response(lines(), mimetype="application/x-ndjson")

    return app


def serve(app: Flask, port: int) -> None:
    """Serve the page until interrupted.

    Raises:
        ValueError: another program uses the port.
    """
    try:
        server = waitress.create_server(app, host=HOST, port=port, ident=None)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise ValueError(f"--port {port} is used by another program; choose another") from None
    print(f"http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
    server.run()  # returns on Ctrl-C
