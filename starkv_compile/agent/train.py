"""Train the shipped agent: `python -m starkv_compile.agent.train --out DIR`.

Two stages. First the vision tower alone learns to tell what each visual token shows and where
it is (crowded screens, so that a step sees many elements). Then the language model learns to
answer by next-token prediction, helped by a loss on looking up the answer where a question ends.
Episodes grow by a frame, then frames by visual tokens, whenever the agent is ready.

The learning rate is constant, then falls linearly over the last `--decay` steps, so a run can be
stopped and resumed with other `--steps`. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .architecture import build_config
from .batches import IGNORE, Batch, sample_batch
from .checkpoints import load_agent, save_agent
from .vocabulary import ATTRIBUTES, BIN_CENTERS, NOUNS, TOKEN_ID, USER

MAX_FRAMES = 5
LEVEL_UP = 0.85  # accuracy on answers at which one more frame is allowed
ROWS = {1: 32, 2: 24, 3: 20, 4: 16, 5: 14}  # fewer rows for longer episodes: seconds a step
QUESTIONS = 16
ISOLATED = 0.5  # share of batches whose questions do not see each other, after the first level
HINT_LAYER = 3
TOKENS_SHOWN = (14, 28, 56, 112)  # of each frame; its elements are 12, the last is all of them
TOWER_ROWS, TOWER_ELEMENTS = 24, 40


class CellProbe(nn.Module):
    """Auxiliary losses, none of which is part of the agent.

    Linear read-outs of a visual token: attribute, noun, x bin, y bin. And of the language
    model's third layer where a question ends: the two words to be looked up. Without the second
    nothing rewards the look-up before the answer, whose preamble says nothing of it.
    """

    def __init__(self, hidden: int):
        super().__init__()
        sizes = (len(ATTRIBUTES) + 1, len(NOUNS) + 1, len(BIN_CENTERS), len(BIN_CENTERS))
        self.heads = nn.ModuleList(nn.Linear(hidden, size) for size in sizes)
        self.hint_heads = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(2))

    def forward(self, features: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """features [N, hidden], cells [N, 4] -> mean cross entropy. Elements weigh 4 x."""
        weight = torch.where(cells[:, 0] > 0, 4.0, 1.0)
        weight = weight / weight.sum()
        losses = [
            (F.cross_entropy(head(features), cells[:, i], reduction="none") * weight).sum()
            for i, head in enumerate(self.heads)
        ]
        return torch.stack(losses).sum()

    def hint_loss(
        self, hidden: torch.Tensor, hints: torch.Tensor, lm_head: nn.Module
    ) -> torch.Tensor:
        """hidden [B, L, hidden], hints [B, L, 2] token ids or IGNORE -> mean cross entropy."""
        place = hints[..., 0] != IGNORE
        found = F.layer_norm(hidden[place], hidden.shape[-1:])
        losses = [
            F.cross_entropy(lm_head(head(found)), hints[place][:, i])
            for i, head in enumerate(self.hint_heads)
        ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def accuracy(self, features: torch.Tensor, cells: torch.Tensor) -> list[float]:
        """Share right for each read-out, over tokens that show an element."""
        shown = cells[:, 0] > 0
        right = [h(features).argmax(-1) == cells[:, i] for i, h in enumerate(self.heads)]
        return [round(r[shown].float().mean().item(), 3) for r in right]


def init_positions(table: nn.Embedding) -> None:
    """Sinusoids over rows and columns. From small noise, place is learned ten times slower."""
    side, quarter = math.isqrt(table.num_embeddings), table.embedding_dim // 4
    place = torch.arange(side) / (side - 1)
    angle = place[:, None] * torch.logspace(0, math.log10(side / 2), quarter) * math.pi
    waves = torch.cat([angle.sin(), angle.cos()], dim=-1)
    rows, columns = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
    with torch.no_grad():
        table.weight.copy_(torch.cat([rows, columns], dim=-1))


def shown_tokens(batch: Batch, is_image: torch.Tensor, tokens: int) -> torch.Tensor:
    """[B, L] bool: all text, and of each frame its elements and random others, `tokens` in all.

    Early training shows the language model few visual tokens a frame. Among a hundred, attention
    to the one that matters starts at a hundredth, too little to be found in reasonable time.
    """
    cells = batch.cells[:, 0].view(len(is_image), batch.frames, -1)
    rank = (torch.rand(cells.shape) + (cells > 0)).argsort(-1, descending=True).argsort(-1)
    shown = torch.ones_like(is_image)
    shown[is_image] = (rank < tokens).flatten()
    return shown


def isolate_questions(
    batch: Batch, is_image: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask [1, 1, L, L] and positions [3, 1, L] that make each turn a prompt of its own.

    A turn after the last frame sees the frames and itself, at the positions it would have if it
    were the only one. Among sixteen chained questions a head that should find its own question's
    words sees a sixteenth of them there, and does not learn to look back at all.
    """
    first_row, length = batch.input_ids[0], batch.input_ids.shape[1]
    place = torch.arange(length)
    frames_end = int(is_image[0].nonzero().max()) + 2  # past the end-of-image marker
    starts = (first_row == TOKEN_ID[USER]) & (place >= frames_end)
    turn = torch.where(place < frames_end, -1, starts.long().cumsum(0))
    start = torch.where(starts, place, frames_end).cummax(0).values
    alone = int(positions[:, 0, :frames_end].max()) + 1 + place - start
    positions = torch.where(turn >= 0, alone, positions)
    visible = (turn[None, :] == turn[:, None]) | (turn[None, :] < 0)
    return (visible & (place[None, :] <= place[:, None]))[None, None], positions


def answer_losses(
    model: Any, probe: CellProbe, batch: Batch, tokens: int, isolated: bool = False
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Answer loss, hint loss, and the share of answers with every token right.

    tokens: visual tokens of each frame that the language model sees. isolated: see
    `isolate_questions`; the batch then has its questions after the last frame.
    """
    core = model.model
    seen = core.visual(batch.pixel_values, grid_thw=batch.grid_thw)
    features = seen.pooler_output
    embeds = core.get_input_embeddings()(batch.input_ids)
    is_image = batch.input_ids == model.config.image_token_id
    embeds = embeds.masked_scatter(is_image[..., None], features)
    one_row = batch.input_ids[:1]
    positions, _ = core.get_rope_index(
        one_row, is_image[:1].int(), image_grid_thw=batch.grid_thw[: batch.frames]
    )
    shown = shown_tokens(batch, is_image, tokens)
    rows = len(embeds)
    mask = None
    if isolated:
        mask, positions = isolate_questions(batch, is_image, positions)
        order = shown.nonzero()[:, 1].view(rows, -1)
        mask = mask[0, 0][order[:, :, None], order[:, None, :]][:, None]
    out = core.language_model(
        inputs_embeds=embeds[shown].view(rows, -1, embeds.shape[-1]),
        attention_mask=mask,
        position_ids=positions.expand(-1, rows, -1)[:, shown].view(3, rows, -1),
        visual_pos_masks=is_image[shown].view(rows, -1),
        deepstack_visual_embeds=[f[shown[is_image]] for f in seen.deepstack_features],
        use_cache=False,
        output_hidden_states=True,
    )
    labels = batch.labels[shown].view(rows, -1)
    asked = labels != IGNORE
    logits = model.lm_head(out.last_hidden_state[asked])
    targets = labels[asked]
    loss = F.cross_entropy(logits, targets)
    accuracy = _whole_answers(asked, (logits.argmax(-1) == targets).detach())
    hints = batch.hints[shown].view(rows, -1, 2)
    hint_loss = probe.hint_loss(out.hidden_states[HINT_LAYER], hints, model.lm_head)
    return loss, hint_loss, accuracy


def _whole_answers(asked: torch.Tensor, right: torch.Tensor) -> float:
    """Share of runs of asked positions [B, L] whose tokens are all right."""
    starts = asked & ~F.pad(asked, (1, 0))[:, :-1]
    answer = starts.flatten().cumsum(0)[asked.flatten()] - 1
    wrong = torch.zeros(int(starts.sum()), dtype=torch.long)
    wrong.index_add_(0, answer, (~right).long())
    return (wrong == 0).float().mean().item()


def learning_rate(step: int, steps: int, decay: int, peak: float) -> float:
    return peak * min(1.0, (step + 1) / 100, max(0.0, (steps - step) / decay))


class Trainer:
    """Model, probe, optimizer and progress; saved and restored as one."""

    def __init__(self, out: Path, seed: int, peak: float, start: Path | None = None):
        from transformers import Qwen3VLForConditionalGeneration

        torch.manual_seed(seed)
        self.out, self.seed, self.peak = out, seed, peak
        self.model: Any = Qwen3VLForConditionalGeneration(build_config()).train()
        init_positions(self.model.model.visual.pos_embed)
        self.probe = CellProbe(self.model.config.text_config.hidden_size)
        self.parameters = [*self.model.parameters(), *self.probe.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.state: dict[str, Any] = {
            "tower_step": 0, "rescaled": False, "step": 0, "level": 1, "density": 0,
            "running": {}, "seconds": 0.0,
        }  # fmt: skip
        if start is not None:
            self.model.load_state_dict(load_agent(start)[0].state_dict())
            self.state |= {"tower_step": None, "rescaled": True}
        out.mkdir(parents=True, exist_ok=True)
        if (out / "resume.pt").exists():
            saved = torch.load(out / "resume.pt", weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.probe.load_state_dict(saved["probe"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.state |= saved["state"]
        self.started = time.monotonic() - self.state["seconds"]

    def save(self) -> None:
        """Write to a second file, then rename: a crash leaves the last good one."""
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
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.state["seconds"] = time.monotonic() - self.started

    def train_tower(self, steps: int) -> None:
        """The first stage; None for an agent that began with a trained tower."""
        while (step := self.state["tower_step"]) is not None and step < steps:
            rng = random.Random(f"tower-{self.seed}-{step}")
            batch = sample_batch(rng, TOWER_ROWS, 1, 1, TOWER_ELEMENTS)
            seen = self.model.model.visual(batch.pixel_values, grid_thw=batch.grid_thw)
            loss = self.probe(seen.pooler_output, batch.cells)
            self.update(loss, learning_rate(step, steps, steps // 3, self.peak))
            self.state["tower_step"] = step + 1
            if step % 50 == 0:
                right = self.probe.accuracy(seen.pooler_output, batch.cells)
                self.log(tower_step=step, probe=round(loss.item(), 4), accuracy=right)
            if (step + 1) % 100 == 0 or step + 1 == steps:
                self.save()

    @torch.no_grad()
    def rescale_features(self) -> None:
        """Bring visual embeddings to the norm of text embeddings, about 1.

        The probe drives them to a norm near 90, where no layer of the language model can add
        to them: they could not learn, say, which frame they belong to.
        """
        if self.state["rescaled"]:
            return
        batch = sample_batch(random.Random(f"scale-{self.seed}"), 4, 1, 1)
        visual = self.model.model.visual
        seen = visual(batch.pixel_values, grid_thw=batch.grid_thw)
        found = [(visual.merger, seen.pooler_output)]
        found += zip(visual.deepstack_merger_list, seen.deepstack_features, strict=True)
        for merger, features in found:
            norm = features.norm(dim=-1).mean()
            merger.linear_fc2.weight /= norm
            merger.linear_fc2.bias /= norm
        for head in self.probe.heads:
            head.weight *= seen.pooler_output.norm(dim=-1).mean()
        self._align_words()
        self.state["rescaled"] = True

    def _align_words(self) -> None:
        """Start each word where the probe reads its meaning off a visual token.

        Then "red" points where red cells point, and matching a question to the screen is close
        to a dot product from the first step on, instead of a thousand steps later.
        """
        words = [
            [*ATTRIBUTES], [*NOUNS],
            [f"x={c}" for c in BIN_CENTERS], [f"y={c}" for c in BIN_CENTERS],
        ]  # fmt: skip
        table: torch.Tensor = self.model.get_input_embeddings().weight
        for head, names in zip(self.probe.heads, words, strict=True):
            weight: torch.Tensor = head.weight  # type: ignore[assignment]
            rows = F.normalize(weight[-len(names) :], dim=-1)  # row 0 may be "no element"
            for name, row in zip(names, rows, strict=True):
                table[TOKEN_ID[name]] = row

    def _level_up(self) -> None:
        """One more frame; at the most frames, more tokens of each."""
        state = self.state
        if state["level"] < MAX_FRAMES:
            state["level"] += 1
        elif state["density"] < len(TOKENS_SHOWN) - 1:
            state["density"] += 1
            state["running"] = {}

    def train_agent(self, steps: int, decay: int) -> None:
        """The second stage. The tower is done: it is not trained on."""
        state = self.state
        self.model.model.visual.requires_grad_(False)
        while (step := state["step"]) < steps:
            rng = random.Random(f"{self.seed}-{step}")
            torch.manual_seed(step)
            level, tokens = state["level"], TOKENS_SHOWN[state["density"]]
            frames = level if rng.random() < 0.4 else rng.randint(1, level)
            isolated = level == 1 or rng.random() < ISOLATED
            batch = sample_batch(rng, ROWS[frames], frames, QUESTIONS, at_end=isolated)
            loss, hint_loss, accuracy = answer_losses(
                self.model, self.probe, batch, tokens, isolated
            )
            self.update(loss + hint_loss, learning_rate(step, steps, decay, self.peak))
            state["step"] = step + 1
            state["running"][frames] = 0.95 * state["running"].get(frames, 0.0) + 0.05 * accuracy
            if state["running"].get(level, 0.0) > LEVEL_UP:
                self._level_up()
            if step % 25 == 0:
                self.log(
                    step=step,
                    loss=round(loss.item(), 4),
                    hints=round(hint_loss.item(), 4),
                    level=state["level"],
                    tokens=tokens,
                    accuracy={k: round(v, 3) for k, v in state["running"].items()},
                )
            if (step + 1) % 100 == 0 or step + 1 == steps:
                self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded GUI agent.")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--start", type=Path, help="go on from this agent's weights")
    parser.add_argument("--tower-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--decay", type=int, default=1200, help="last steps, with a falling rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainer = Trainer(args.out, args.seed, args.lr, args.start)
    trainer.train_tower(args.tower_steps)
    trainer.rescale_features()
    trainer.train_agent(args.steps, args.decay)
    save_agent(trainer.model, args.out)


if __name__ == "__main__":
    main()
