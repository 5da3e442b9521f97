"""Trains the demo agent: `python -m starkv_lab.training.train --out DIR`.

Training has two stages. First the vision tower learns what each visual token shows and where it is.
Its screens are crowded, so that a step sees many elements. Then the language model learns to answer
by next-token prediction, from screens that the tower has seen once. Whenever the agent is ready,
episodes get one more frame, and later frames get more visual tokens. The defaults made the demo
agent in 58 minutes on one core that did other work too. The first stage took 10 of them.

The learning rate is constant, then falls linearly over the last `--decay` steps. It starts to fall
when the agent answers about all frames and all tokens, and not before step `--steps` - `--decay`.
How soon that is differs between machines, which round differently. Seeds 0, 1 and 2 once took fewer
than 2,900 steps for everything. On another machine seeds 1 and 2 left the questions about one frame
after 4,100 steps, and ended at 6,500 and 5,800. The same command continues where it stopped, also
with other `--steps`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..agent.architecture import build_config
from ..agent.batches import IGNORE, Dialogues, draw, sample_episodes, sample_plan, write
from ..agent.checkpoints import load_agent, save_agent
from ..agent.vocabulary import ATTRIBUTES, BIN_CENTERS, NOUNS, TOKEN_ID, USER
from . import initial
from .pool import SeenEpisodes, see_episodes

MAX_FRAMES = 5
LEVEL_UP = 0.85  # share of right answers at which episodes get one more frame
ROWS, QUESTIONS = 16, 8
ISOLATED = 0.5  # after the first level: share of batches whose questions do not see each other
TOKENS_SHOWN = (14, 28, 56, 112)  # visual tokens of each frame: 12 elements and others, or all
TOWER_ROWS, TOWER_ELEMENTS = 24, 40
MOST = 4  # times `--steps`, after which a run that is not ready gives up
POOL = 300  # episodes of each grid for the language model


class CellProbe(nn.Module):
    """Reads attribute, noun, x bin and y bin from a visual token. The agent does not keep it."""

    def __init__(self, hidden: int):
        super().__init__()
        sizes = (len(ATTRIBUTES) + 1, len(NOUNS) + 1, len(BIN_CENTERS), len(BIN_CENTERS))
        self.heads = nn.ModuleList(nn.Linear(hidden, size) for size in sizes)

    def forward(self, features: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross entropy of features [N, hidden] and cells [N, 4].

        Cells with an element have four times the weight.
        """
        weight = torch.where(cells[:, 0] > 0, 4.0, 1.0)
        weight = weight / weight.sum()
        losses = [
            (F.cross_entropy(head(features), cells[:, i], reduction="none") * weight).sum()
            for i, head in enumerate(self.heads)
        ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def accuracy(self, features: torch.Tensor, cells: torch.Tensor) -> list[float]:
        """Returns the share of right read-outs of each kind, over tokens that show an element."""
        shown = cells[:, 0] > 0
        right = [h(features).argmax(-1) == cells[:, i] for i, h in enumerate(self.heads)]
        return [round(r[shown].float().mean().item(), 3) for r in right]


def shown_tokens(has_element: torch.Tensor, is_image: torch.Tensor, tokens: int) -> torch.Tensor:
    """Chooses the shown tokens [B, L]: all text, and `tokens` visual tokens of each frame.

    These are the frame's elements (`has_element` [B, F, n]) and random others. Early training shows
    few visual tokens. Among a hundred, the attention to the right token starts at a hundredth,
    which is too little to learn from in reasonable time.
    """
    order = torch.rand(has_element.shape) + has_element
    rank = order.argsort(-1, descending=True).argsort(-1)
    shown = torch.ones_like(is_image)
    shown[is_image] = (rank < tokens).flatten()
    return shown


def isolate_questions(
    text: Dialogues, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a mask [L, L] and positions [3, 1, L] that separate the turns from each other.

    A turn after the last frame sees the frames and itself, at the positions of an only turn. If
    turns saw each other, a head that should find the words of its question would also find others,
    and would learn more slowly.
    """
    place = torch.arange(text.input_ids.shape[1])
    frames_end = int(text.is_image[0].nonzero().max()) + 2  # after the end-of-image marker
    starts = (text.input_ids[0] == TOKEN_ID[USER]) & (place >= frames_end)
    turn = torch.where(place < frames_end, -1, starts.long().cumsum(0))
    start = torch.where(starts, place, frames_end).cummax(0).values
    alone = int(positions[:, 0, :frames_end].max()) + 1 + place - start
    positions = torch.where(turn >= 0, alone, positions)
    visible = (turn[None, :] == turn[:, None]) | (turn[None, :] < 0)
    return visible & (place[None, :] <= place[:, None]), positions


def answer_loss(
    model: Any, seen: SeenEpisodes, text: Dialogues, tokens: int, isolated: bool = False
) -> tuple[torch.Tensor, float]:
    """Returns the loss, and the share of answers whose tokens are all right.

    Args:
        tokens: visual tokens of each frame that the language model sees.
        isolated: whether to separate the turns with `isolate_questions`. The dialogues then need
            all questions after the last frame.
    """
    core = model.model
    rows, frames, _, hidden = seen.features.shape
    is_image = text.is_image
    embeds = core.get_input_embeddings()(text.input_ids)
    embeds = embeds.masked_scatter(is_image[..., None], seen.features.float())
    positions, _ = core.get_rope_index(
        text.input_ids[:1],
        is_image[:1].int(),
        image_grid_thw=torch.tensor([[1, *seen.grid]] * frames),
    )
    shown = shown_tokens(seen.has_element, is_image, tokens)
    mask = None
    if isolated:
        visible, positions = isolate_questions(text, positions)
        order = shown.nonzero()[:, 1].view(rows, -1)
        mask = visible[order[:, :, None], order[:, None, :]][:, None]
    out = core.language_model(
        inputs_embeds=embeds[shown].view(rows, -1, hidden),
        attention_mask=mask,
        position_ids=positions.expand(-1, rows, -1)[:, shown].view(3, rows, -1),
        visual_pos_masks=is_image[shown].view(rows, -1),
        deepstack_visual_embeds=[seen.deepstack.float().view(-1, hidden)[shown[is_image]]],
        use_cache=False,
    )
    labels = text.labels[shown].view(rows, -1)
    asked = labels != IGNORE
    logits, targets = model.lm_head(out.last_hidden_state[asked]), labels[asked]
    accuracy = _whole_answers(asked, (logits.argmax(-1) == targets).detach())
    return F.cross_entropy(logits, targets), accuracy


def _whole_answers(asked: torch.Tensor, right: torch.Tensor) -> float:
    """Returns the share of answers (runs in `asked` [B, L]) whose tokens are all right."""
    starts = asked & ~F.pad(asked, (1, 0))[:, :-1]
    answer = starts.flatten().cumsum(0)[asked.flatten()] - 1
    wrong = torch.zeros(int(starts.sum()), dtype=torch.long)
    wrong.index_add_(0, answer, (~right).long())
    return (wrong == 0).float().mean().item()


def learning_rate(step: int, steps: int, decay: int, peak: float) -> float:
    return peak * min(1.0, (step + 1) / 100, max(0.0, (steps - step) / decay))


def last_step(steps: int, decay: int, step: int, ready: int | None) -> int:
    """Returns the number of steps of a run that is at `step` and was ready at `ready`, if it was.

    There are at least `steps`, and `decay` from the step on at which the agent was ready.
    """
    return max(steps, decay + (step + 1 if ready is None else ready))


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor, rate: float) -> None:
    """Takes one step at that learning rate, with gradients clipped to norm 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


class Trainer:
    """Trains the agent. It saves and restores model, probe, optimizer and progress together."""

    def __init__(self, out: Path, seed: int, peak: float, tower: Path | None = None):
        from transformers import Qwen3VLForConditionalGeneration

        torch.manual_seed(seed)
        self.out, self.seed, self.peak = out, seed, peak
        self.model: Any = Qwen3VLForConditionalGeneration(build_config()).train()
        self.visual = self.model.model.visual
        initial.start_positions(self.visual.pos_embed)
        initial.start_attention(self.model.model.language_model)
        self.probe = CellProbe(self.model.config.text_config.hidden_size)
        parameters = [*self.model.parameters(), *self.probe.parameters()]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.state: dict[str, Any] = {
            "tower_step": 0,
            "tower_done": False,
            "step": 0,
            "level": 1,
            "density": 0,
            "ready": None,
            "running": {},
            "seconds": 0.0,
        }
        if tower is not None:
            self._take_tower(tower)
        out.mkdir(parents=True, exist_ok=True)
        if (out / "resume.pt").exists():
            saved = torch.load(out / "resume.pt", weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.probe.load_state_dict(saved["probe"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.state |= saved["state"]
        self.started = time.monotonic() - self.state["seconds"]

    def _take_tower(self, folder: Path) -> None:
        """Takes vision tower and words from a trained agent, which replaces the first stage."""
        trained = load_agent(folder)[0]
        self.visual.load_state_dict(trained.model.visual.state_dict())
        with torch.no_grad():
            words = trained.get_input_embeddings().weight
            self.model.get_input_embeddings().weight.copy_(words)
        self.state["tower_done"] = True

    def save(self) -> None:
        """Writes a second file, then renames it, so that a crash leaves the last good file."""
        everything = {
            "model": self.model.state_dict(),
            "probe": self.probe.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": self.state,
        }
        torch.save(everything, self.out / "resume.tmp")
        (self.out / "resume.tmp").replace(self.out / "resume.pt")

    def log(self, **record: Any) -> None:
        line = json.dumps({**record, "minutes": round(self.state["seconds"] / 60, 1)})
        with (self.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def update(self, loss: torch.Tensor, rate: float) -> None:
        descend(self.optimizer, loss, rate)
        self.state["seconds"] = time.monotonic() - self.started

    def train_tower(self, steps: int) -> None:
        """Runs the first stage."""
        if self.state["tower_done"]:
            return
        while (step := self.state["tower_step"]) < steps:
            rng = random.Random(f"tower-{self.seed}-{step}")
            screens = draw(sample_episodes(rng, TOWER_ROWS, 1, TOWER_ELEMENTS))
            features = self.visual(screens.pixel_values, grid_thw=screens.grid_thw).pooler_output
            loss = self.probe(features, screens.cells)
            self.update(loss, learning_rate(step, steps, steps // 3, self.peak))
            self.state["tower_step"] = step + 1
            if step % 50 == 0:
                right = self.probe.accuracy(features, screens.cells)
                self.log(tower_step=step, probe=round(loss.item(), 4), accuracy=right)
            if (step + 1) % 100 == 0:
                self.save()
        screens = draw(sample_episodes(random.Random(f"scale-{self.seed}"), 4, 1))
        with torch.no_grad():
            seen = self.visual(screens.pixel_values, grid_thw=screens.grid_thw)
        initial.start_features(self.visual, self.probe.heads, seen)
        initial.start_words(self.model.get_input_embeddings().weight, self.probe.heads)
        self.state["tower_done"] = True
        self.save()

    def _level_up(self) -> None:
        """Adds a frame to episodes, or, if they have all frames, visual tokens to frames.

        If frames have all tokens, the agent is ready.
        """
        state = self.state
        if state["level"] < MAX_FRAMES:
            state["level"] += 1
        elif state["density"] < len(TOKENS_SHOWN) - 1:
            state["density"] += 1
            state["running"] = {}
        elif state["ready"] is None:
            state["ready"] = state["step"]

    def train_agent(self, steps: int, decay: int) -> None:
        """Runs the second stage, which does not train the tower any more."""
        state = self.state
        self.visual.requires_grad_(False)
        pool = list(see_episodes(self.visual, self.seed, POOL, MAX_FRAMES))
        self.log(pool=sum(len(seen.episodes) for seen in pool))
        while (step := state["step"]) < (
            end := last_step(steps, decay, state["step"], state["ready"])
        ):
            if step == MOST * steps and state["ready"] is None:
                raise SystemExit(
                    f"not ready after {step} steps: it answers {state['running']} of the questions "
                    f"by number of frames, expected {LEVEL_UP} at {MAX_FRAMES}; try another --seed"
                )
            rng = random.Random(f"{self.seed}-{step}")
            torch.manual_seed(step)
            level, tokens = state["level"], TOKENS_SHOWN[state["density"]]
            frames = level if rng.random() < 0.5 else rng.randint(1, level)
            isolated = level == 1 or rng.random() < ISOLATED
            seen = rng.choice(pool).sample(rng, ROWS, frames)
            text = write(rng, seen.episodes, sample_plan(rng, frames, QUESTIONS, isolated))
            loss, accuracy = answer_loss(self.model, seen, text, tokens, isolated)
            self.update(loss, learning_rate(step, end, decay, self.peak))
            state["step"] = step + 1
            state["running"][frames] = 0.95 * state["running"].get(frames, 0.0) + 0.05 * accuracy
            if state["running"].get(level, 0.0) > LEVEL_UP:
                self._level_up()
            if step % 25 == 0:
                self.log(
                    step=step,
                    loss=round(loss.item(), 4),
                    level=state["level"],
                    tokens=tokens,
                    accuracy={k: round(v, 3) for k, v in state["running"].items()},
                )
            if (step + 1) % 100 == 0 or step + 1 == end:
                self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains an agent like the demo agent.")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--tower", type=Path, help="agent folder whose tower and words replace the first stage"
    )
    parser.add_argument("--tower-steps", type=int, default=850, help="steps of the first stage")
    parser.add_argument("--steps", type=int, default=2900, help="fewest steps of the second stage")
    parser.add_argument(
        "--decay", type=int, default=700, help="last steps, in which the rate falls"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainer = Trainer(args.out, args.seed, args.lr, args.tower)
    trainer.train_tower(args.tower_steps)
    trainer.train_agent(args.steps, args.decay)
    save_agent(trainer.model, args.out)


if __name__ == "__main__":
    main()
