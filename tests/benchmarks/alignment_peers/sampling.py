"""Our sampler beside transformers' own ``generate`` of Janus: the same tiny model, the same prompts, the same codes.

``generate(generation_mode="image")`` of transformers 5.23 embeds the ids of a prompt and nothing else, so a history's
pictures never reach it. Here the peer's copy of the model has the aligned features of every catalogue picture as more
rows of its embedding, and the prompts name those rows: both sides read the very same vectors. It always runs both rows
of guidance, and fails at a guidance of 1 or less; guidance 1 is measured at 1 + 1e-6, where the other row counts for
nothing but still costs the peer its time.

``generate`` runs in a process of its own, in turns with ours. In our process it would gain from what ours sets up there
(a process keeps the memory its tensors free, and ``generate`` frees and takes its whole cache at every token); that
ratio stands beside the other as ``ratio_same_process``.

Legend: U users, n samples a user, L codes a picture, P prompt tokens, I items, T feature tokens a picture.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVisionModel

from couturier.components.data.formats import Catalogue
from couturier.components.generator.janus import GeneratorConfig, JanusGenerator
from couturier.components.generator.prompt import BEGIN_OF_IMAGE, Prompts, id_of
from couturier.components.runtime import global_seed, seeded_numpy, threads

USERS, SAMPLES, ITEMS, CODES, CODEBOOK = 8, 8, 96, 16, 256
GUIDANCE, NEARLY_ONE = 5.0, 1 + 1e-6


def catalogue(items: int = ITEMS, size: int = 32) -> Catalogue:
    """A made-up catalogue: noise for pictures, two attributes for words."""
    random = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "item_id": [f"item-{i:03d}" for i in range(items)],
            "title": [f"Item {i}" for i in range(items)],
            "text": [f"item {i}" for i in range(items)],
            "category": [f"kind {i % 12}" for i in range(items)],
            "brand": ["own" if i % 2 else "other" for i in range(items)],
            "purchases": [items - i for i in range(items)],
        }
    )
    rgb = random.integers(0, 256, (items, size, size, 3), dtype=np.uint8)
    return Catalogue(items=frame, rgb_IHWC=rgb, attributes=("category", "brand"), attribution="made up")


def generator(seed: int) -> JanusGenerator:
    """A Janus of the demo's shape: width 128, 4 layers, twelve items of three tokens in a prompt, 16 codes of 256."""
    with global_seed(seed, "eyes"):
        eyes = JanusVisionModel(
            JanusVisionConfig(
                hidden_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=32,
                num_image_tokens=1,
                mlp_ratio=2.0,
            )
        )
    return JanusGenerator.tiny(
        GeneratorConfig(), catalogue(), eyes=eyes, codebook=CODEBOOK, codes=CODES, seed=seed
    ).eval()


class Peer:
    """transformers' ``generate`` over a copy of our model."""

    def __init__(self, ours: JanusGenerator) -> None:
        self.model: JanusForConditionalGeneration = copy.deepcopy(ours.model)
        janus, builder = self.model.model, ours.prompts
        words_VD = janus.get_input_embeddings().weight.detach()
        with torch.no_grad():
            pictures_ID = janus.aligner(ours.features_ITF).flatten(0, 1)
        janus.set_input_embeddings(nn.Embedding.from_pretrained(torch.cat([words_VD, pictures_ID])))
        self.first_picture, self.tokens = len(words_VD), builder.picture_tokens
        # It draws as many codes as the understanding tower has tokens, whatever the codec says.
        janus.vision_model.config.num_image_tokens = ours.codes_per_picture
        self.fixed: dict[str, Any] = {
            "pad_token_id": builder.pad_id,
            "bos_token_id": int(builder.tokenizer.bos_token_id),
            "eos_token_id": int(builder.tokenizer.eos_token_id),
            "generation_kwargs": {"boi_token_id": id_of(builder.tokenizer, BEGIN_OF_IMAGE)},
            "max_new_tokens": ours.codes_per_picture,
        }

    def ids(self, prompts: Prompts) -> Tensor:
        """Prompt ids ``[U, P]`` whose picture places name rows of the longer embedding."""
        place_UP = prompts.item_UP >= 0
        nth_UP = (place_UP.long().cumsum(1) - 1) % self.tokens
        return torch.where(place_UP, self.first_picture + prompts.item_UP * self.tokens + nth_UP, prompts.ids_UP)

    @torch.no_grad()
    def sample(self, prompts: Prompts, n: int, *, guidance: float, greedy: bool) -> Tensor:
        """Codes ``[U, n, L]``."""
        ids_UP, mask_UP = self.ids(prompts), cast(torch.LongTensor, prompts.mask_UP.long())
        how: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "num_return_sequences": n}
        if greedy:
            # It refuses to return several greedy sequences: copies of the prompt are asked for instead.
            how = {"do_sample": False}
            ids_UP = ids_UP.repeat_interleave(n, 0)
            mask_UP = cast(torch.LongTensor, mask_UP.repeat_interleave(n, 0))
        config = GenerationConfig(guidance_scale=guidance, **how, **self.fixed)
        codes = self.model.generate(ids_UP, attention_mask=mask_UP, generation_mode="image", generation_config=config)
        return codes.view(len(prompts.ids_UP), n, -1)


def histories(seed: int) -> np.ndarray:
    """Item indices ``[U, 12]``: most full, some shorter."""
    random = seeded_numpy(seed, "alignment", "histories")
    found_UK = np.stack([random.permutation(ITEMS)[:12] for _ in range(USERS)])
    found_UK[1, 7:], found_UK[2, 2:] = -1, -1
    return found_UK


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


class Apart:
    """``generate`` in a process of its own, as somebody would run it: nothing of ours has set up its memory or threads.

    It waits without working until it is asked.
    """

    def __init__(self, seed: int, cores: int) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.alignment_peers.sampling", str(seed), str(cores)]
        root = str(Path(__file__).resolve().parents[3])
        self._process = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def seconds(self, guidance: float) -> tuple[float, float]:
        """Wall and CPU seconds of drawing once, measured there.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{guidance}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"generate's process ended with {self._process.wait()}")
        wall, cpu = json.loads(answer)
        return wall, cpu


def answer_turns(seed: int, cores: int) -> None:
    """The process of :class:`Apart`: a line with a guidance in, a line with wall and CPU seconds out."""
    torch.set_num_threads(cores)
    ours = generator(seed)
    peer, prompts = Peer(ours), ours.prompts.build(histories(seed))
    for line in sys.stdin:
        guidance = float(line)
        found = timed(partial(peer.sample, prompts, SAMPLES, guidance=guidance, greedy=False))
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


def taking_turns(calls: dict[str, Callable[[], tuple[float, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """Median wall and CPU seconds, as each call says them, over ``rounds`` in turns, after one that is not counted."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            both = call()
            if turn:
                seen[name].append(both)
    return {
        name: {
            "wall_s": statistics.median(wall for wall, _ in both),
            "cpu_s": statistics.median(cpu for _, cpu in both),
        }
        for name, both in seen.items()
    }


def ratio(*, seed: int = 0, rounds: int = 9, cores: int = 2) -> dict[str, Any]:
    """``{ratio, ours, other, unit, …}``: tokens a second of both sides under guidance; beside it near guidance 1, by
    processor seconds, and whether greedy codes are the same."""
    ours, shown_UK = generator(seed), histories(seed)
    peer, seeds = Peer(ours), list(range(USERS))
    prompts = ours.prompts.build(shown_UK)
    same = {
        f"greedy_equal_guidance_{guidance:g}": bool(
            torch.equal(
                ours.sample(shown_UK, 2, seeds=seeds, guidance=guidance, temperature=0),
                peer.sample(prompts, 2, guidance=guidance, greedy=True),
            )
        )
        for guidance in (NEARLY_ONE, GUIDANCE)
    }
    with threads(cores), Apart(seed, cores) as apart:
        times = taking_turns(
            {
                "ours": lambda: timed(lambda: ours.sample(shown_UK, SAMPLES, seeds=seeds, guidance=GUIDANCE)),
                "other": lambda: apart.seconds(GUIDANCE),
                "other_here": lambda: timed(lambda: peer.sample(prompts, SAMPLES, guidance=GUIDANCE, greedy=False)),
                "ours_plain": lambda: timed(lambda: ours.sample(shown_UK, SAMPLES, seeds=seeds)),
                "other_plain": lambda: apart.seconds(NEARLY_ONE),
            },
            rounds,
        )
    tokens = USERS * SAMPLES * CODES
    return {
        "ratio": times["other"]["wall_s"] / times["ours"]["wall_s"],
        "ours": tokens / times["ours"]["wall_s"],
        "other": tokens / times["other"]["wall_s"],
        "unit": "tokens a second",
        "ratio_cpu": times["other"]["cpu_s"] / times["ours"]["cpu_s"],
        "guidance": GUIDANCE,
        "ratio_guidance_1": times["other_plain"]["wall_s"] / times["ours_plain"]["wall_s"],
        "ratio_guidance_1_cpu": times["other_plain"]["cpu_s"] / times["ours_plain"]["cpu_s"],
        "ours_guidance_1": tokens / times["ours_plain"]["wall_s"],
        "other_guidance_1": tokens / times["other_plain"]["wall_s"],
        "ratio_same_process": times["other_here"]["wall_s"] / times["ours"]["wall_s"],
        "other_same_process": tokens / times["other_here"]["wall_s"],
        "greedy_equal": all(same.values()),
        **same,
        "threads": cores,
        "rounds": rounds,
        "shape": f"{USERS} users x {SAMPLES} samples, prompt {prompts.ids_UP.shape[1]}, {CODES} codes of {CODEBOOK}",
    }


if __name__ == "__main__":
    answer_turns(*(int(word) for word in sys.argv[1:]))
