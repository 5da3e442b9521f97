"""An engine of vLLM in this process, and prompts of the demo agent for it."""

import contextlib
import gc
import os
import shutil
from importlib.resources import files
from pathlib import Path

from starkv_lab.agent.checkpoints import load_agent
from starkv_lab.demo.turns import episode_turns

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)

FRAMES = 4
BLOCK = 32
TOKENS = 24
CHECKPOINT = files("starkv_lab") / "agent" / "checkpoint"


def write_checkpoint(folder: Path) -> Path:
    """The demo agent as vLLM reads it: it asks for the video part of a Qwen3-VL's processor."""
    shutil.copytree(str(CHECKPOINT), folder, dirs_exist_ok=True)
    extra = Path(__file__).parents[1] / "examples" / "video_preprocessor_config.json"
    shutil.copy(extra, folder)
    return folder


def conversations(count, seed=5000):
    """Messages of `count` sessions of four screenshots, each with its last question open.

    Earlier questions are answered. Sessions of one episode share their screenshots.
    """
    found = []
    while len(found) < count:
        turns = episode_turns(FRAMES, seed)
        seed += 1
        shown = turns[:FRAMES]
        for last in (shown[-1], *turns[FRAMES:]):
            before = shown[:-1] if last is shown[-1] else shown
            messages = []
            for turn in before:
                messages.append({"role": "user", "content": turn.content})
                messages.append({"role": "assistant", "content": turn.question.answer})
            messages.append({"role": "user", "content": last.content})
            found.append((messages, last.question))
    return found[:count]


def pictures(messages):
    return [
        part["image"]
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]


def prompts(count, longer=""):
    """What `LLM.generate` takes, and the questions. longer: text after each prompt."""
    _, processor = load_agent()
    told = conversations(count)
    made = [
        {
            "prompt": processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            + longer,
            "multi_modal_data": {"image": pictures(messages)},
        }
        for messages, _ in told
    ]
    return made, [question for _, question in told]


class Engine:
    """One engine, and what its scheduler did.

    Attributes:
        used: blocks in use after each step.
        running: requests running at each step.
        preempted: how many requests were preempted.
    """

    def __init__(self, folder, starkv=None, **options):
        from vllm import LLM

        given = {
            "dtype": "float32",
            "max_model_len": 1024,
            "enforce_eager": True,
            "limit_mm_per_prompt": {"image": 8},
            "block_size": BLOCK,
            "enable_prefix_caching": False,
            "distributed_executor_backend": "uni",
            "seed": 0,
            **options,
        }
        if starkv is not None:
            given["additional_config"] = {"starkv": starkv}
        self.llm = LLM(model=str(folder), **given)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.used, self.running, self.preempted = [], [], 0
        self._watch()

    def _watch(self):
        schedule, preempt = self.scheduler.schedule, self.scheduler._preempt_request

        def watched(*args, **kwargs):
            found = schedule(*args, **kwargs)
            self.used.append(self.blocks_in_use)
            self.running.append(len(self.scheduler.running))
            return found

        def counted(*args, **kwargs):
            self.preempted += 1
            return preempt(*args, **kwargs)

        self.scheduler.schedule, self.scheduler._preempt_request = watched, counted

    def preempt_all_at(self, *steps):
        """Preempts every running request before these steps, counted from 1."""
        schedule, count = self.scheduler.schedule, 0

        def interrupting(*args, **kwargs):
            nonlocal count
            count += 1
            if count in steps:
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
            return schedule(*args, **kwargs)

        self.scheduler.schedule = interrupting

    @property
    def blocks_in_use(self):
        pool = self.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - pool.get_num_free_blocks() - 1  # less the null block

    @property
    def runner(self):
        worker = self.core.model_executor.driver_worker
        return getattr(worker, "worker", worker).model_runner

    def ask(self, made, budget=None, tokens=TOKENS, adapter=None, **sampling):
        """Replies to prompts.

        budget: of every request; a list: of each; None: the engine's. adapter: vLLM's LoRARequest.
        """
        from vllm import SamplingParams

        budgets = budget if isinstance(budget, list) else [budget] * len(made)
        settings = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, **sampling}
        params = [
            SamplingParams(**settings, extra_args=None if each is None else {"starkv_budget": each})
            for each in budgets
        ]
        return self.llm.generate(made, params, use_tqdm=False, lora_request=adapter)

    def tokens(self, made, budget=None, **sampling):
        return [list(one.outputs[0].token_ids) for one in self.ask(made, budget, **sampling)]


@contextlib.contextmanager
def engine(folder, starkv=None, **options):
    """An engine, and room for the next one afterwards."""
    made = Engine(folder, starkv, **options)
    try:
        yield made
    finally:
        from vllm.distributed import cleanup_dist_env_and_memory

        made.core.shutdown()
        del made
        gc.collect()
        cleanup_dist_env_and_memory()
