"""Prompts with the responses that a model shall learn to give, a JSON object a line: {"prompt": "…", "response": "…"}.

Both are taken as they stand: what marks where a turn begins and ends belongs into them.
"""

import json
from collections.abc import Iterable, Iterator

from data.sources import Document, SourceFile


def read_instructions(files: Iterable[SourceFile], skipped: dict[str, list[str]]) -> Iterator[Document]:
    """Yield a document `name#line` for every line; those without a response are added to `skipped`.

    Raises ValueError naming the file and the line of anything else.
    """
    for file in files:
        with open(file.path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                prompt, response = _parse(line, f"{file.path}, line {number}")
                if response:
                    yield Document(f"{file.name}#{number}", prompt + response, len(prompt))
                else:
                    skipped.setdefault("without a response", []).append(f"{file.name}#{number}")


def _parse(line: bytes, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
        prompt, response = entry["prompt"], entry["response"]
    except (ValueError, KeyError, TypeError):
        prompt = response = None
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise ValueError(f"data.paths: {where}: is no JSON object with the texts prompt and response; mend that line")
    return prompt, response
