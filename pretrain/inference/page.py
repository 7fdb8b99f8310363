"""A web page with a form for a prompt, which shows tokens as they are generated. Served to this machine only.

The server listens on 127.0.0.1, answers only to local host names, and refuses forms that another site could post.
"""

import errno
import json
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import waitress
from flask import Flask, Response, render_template, request

from pretrain.inference.sampling import Sampling
from pretrain.inference.text_generator import TextGenerator

HOST = "127.0.0.1"
LARGEST_SEED = 2**31
DEFAULTS = Sampling()


def make_app(
    generator: TextGenerator, name: str, defaults: Sampling = DEFAULTS, *, prompt: str = "", tokens: int = 200,
    stops: Sequence[str] = (), seed: int | None = None,
) -> Flask:  # fmt: skip
    """A server with the page at /, whose script requests text with POST /write.

    POST /write takes a JSON object with "prompt", and optionally "tokens", "stops" and the fields of Sampling. Without
    "seed", the seed is random. The answer has a JSON object per line: {"text"} for each piece of text, and at the
    end {"speed", "seed"}. A wrong value is answered with status 400 and a message.

    Args:
        name: the name of the model, shown on the page.
        defaults: the sampling options at the start, except the seed.
        prompt: the prompt in the form at the start.
        tokens: the maximum number of tokens in the form at the start.
        stops: every text ends before the first of these.
        seed: the seed in the form at the start; None for a random seed for each text.
    """
    start = asdict(defaults) | {"prompt": prompt, "tokens": tokens, "stops": list(stops), "seed": seed}
    app = Flask(__name__, template_folder=".")
    app.config["TRUSTED_HOSTS"] = [HOST, "localhost"]  # refuses other sites' names for this address
    one_at_a_time = threading.Lock()

    @app.get("/")
    def page() -> str:
        return render_template("page.html", name=name, **start)

    @app.post("/write")
    def write() -> Response | tuple[str, int]:
        asked = request.get_json()  # refuses other content types: before JSON, browsers ask the server for permission
        try:
            if asked.get("seed") is None:
                asked["seed"] = secrets.randbelow(LARGEST_SEED)
            values = {key: type(default)(asked.get(key, default)) for key, default in asdict(defaults).items()}
            sampling, prompt = Sampling(**values), str(asked["prompt"])
            most, ends = int(asked.get("tokens", tokens)), list(asked.get("stops", stops))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return str(error), 400

        def lines() -> Iterator[str]:
            with one_at_a_time:
                for text in generator.stream(prompt, most, sampling, ends):
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
