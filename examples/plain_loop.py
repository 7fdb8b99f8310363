"""Grass in a plain training loop, on the LlamaForCausalLM of transformers.

    pip install torch transformers
    python examples/plain_loop.py --out runs/plain_loop

Trains a small model from random weights on the source of a Python module, one token per byte, without a download. The
state is saved every 20 steps, and the same command resumes exactly from the newest state. At the end, the folder
`model` in --out holds a plain model for `from_pretrained`.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))  # makes the checkout of Grass importable

from models.convert import convert_linears, restore_linears  # noqa: E402
from optim.grass import Grass  # noqa: E402

SEQUENCES, TOKENS = 8, 64


def new_model() -> LlamaForCausalLM:
    """Return a LLaMA for bytes with random weights. To fine-tune, load `LlamaForCausalLM.from_pretrained` instead."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=TOKENS, **sizes))


def text_bytes() -> torch.Tensor:
    """Return a text of about 100 KB that every Python installation has: the source of argparse."""
    return torch.tensor(list(Path(argparse.__file__).read_bytes()))


def loss_of(model: LlamaForCausalLM, text: torch.Tensor, step: int) -> torch.Tensor:
    """Return the loss of the batch of this step, in nats per token."""
    starts = torch.randint(len(text) - TOKENS, (SEQUENCES,), generator=torch.Generator().manual_seed(step))
    ids = torch.stack([text[start : start + TOKENS] for start in starts])
    return model(input_ids=ids, labels=ids).loss


def train(out: Path, steps: int, save_every: int = 20) -> list[float]:
    """Train up to `steps` steps, from the state in `out` if there is one. Return the loss of each step."""
    text = text_bytes()
    model = new_model()
    convert_linears(model, rank=16)  # before the optimizer is made; embeddings, norms and head stay as they are
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    grass = Grass(model, optimizer)

    saved = out / "state.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        grass.load_state_dict(state_dict=state["grass"])
        print(f"resumed after {grass.steps} steps")
    else:
        grass.start(lambda: loss_of(model, text, 0).backward())  # chooses the initial rows; makes no update

    losses = []
    for step in range(grass.steps, steps):
        loss = loss_of(model, text, step)
        loss.backward()
        optimizer.step()  # hooks fold the rows into the weights and choose new ones
        optimizer.zero_grad()
        losses.append(loss.item())
        if grass.steps % save_every == 0 or grass.steps == steps:
            print(f"step {grass.steps}: {losses[-1]:.4f} nats per byte")
            save(out, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "grass": grass.state_dict()})

    restore_linears(model)  # plain nn.Linear again, with the trained weights
    model.save_pretrained(out / "model")
    return losses


def save(out: Path, state: dict) -> None:
    """Write the state so that after a kill the file holds either the old or the new state."""
    out.mkdir(parents=True, exist_ok=True)
    torch.save(state, out / "state.pt.new")
    (out / "state.pt.new").replace(out / "state.pt")


def main(arguments: list[str] | None = None) -> list[float]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/plain_loop"), help="output folder (default: %(default)s)")
    p.add_argument("--steps", type=int, default=100, help="training steps (default: %(default)s)")
    args = p.parse_args(arguments)
    return train(args.out, args.steps)


if __name__ == "__main__":
    main()
