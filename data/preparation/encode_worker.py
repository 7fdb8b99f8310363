"""A process that encodes records: pickled records on its standard input, pickled tokens on its standard output."""

import os
import pickle
import sys

from data.preparation.encode import Encoder
from data.tokenizer import Tokenizer


def main() -> None:
    """Answer each list of records with its tokens, until the other process closes its end of the pipe or ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of a library must not get between the answers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    questions = sys.stdin.buffer
    try:
        path, special, parse = pickle.load(questions)
        encode = Encoder(Tokenizer(path, **special), parse, threads=1)
        while True:
            pickle.dump(encode(pickle.load(questions)), answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)


if __name__ == "__main__":
    main()
