"""The alignment benchmark's two sides do the same work. Its figures are no test: nothing here is timed."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch
from transformers import LlamaForCausalLM

from couturier.components.alignment import align
from couturier.components.errors import ConfigError, DataError

from .alignment_peers import ceiling, grpo_step, methods, sampling


def test_greedy_codes_are_those_of_transformers_generate() -> None:
    """Full, short and shorter histories, pictures and words in the prompt, with and without guidance."""
    ours, shown_UK = sampling.generator(seed=1), sampling.histories(seed=1)
    peer, prompts = sampling.Peer(ours), ours.prompts.build(shown_UK)
    for guidance in (sampling.NEARLY_ONE, 5.0):
        mine = ours.sample(shown_UK, 2, seeds=list(range(8)), guidance=guidance, temperature=0)
        assert torch.equal(mine, peer.sample(prompts, 2, guidance=guidance, greedy=True))
    assert not torch.equal(mine[:1], mine[1:2])


def test_generate_draws_in_a_process_of_its_own() -> None:
    with sampling.Apart(seed=1, cores=1) as apart:
        times = [apart.seconds(guidance) for guidance in (sampling.GUIDANCE, sampling.NEARLY_ONE)]
        apart._process.kill()
        with pytest.raises(RuntimeError, match="ended"):
            apart.seconds(sampling.GUIDANCE)
    assert all(wall > 0 and cpu > 0 for wall, cpu in times)


def test_sampled_codes_have_the_distribution_of_transformers_generate() -> None:
    """First codes of one user, guided: both sides against each other and the formula, in eight equally likely bins."""
    ours, shown_UK = sampling.generator(seed=1), sampling.histories(seed=1)[:1]
    ours.codes_per_picture = 1
    peer, prompts, n = sampling.Peer(ours), ours.prompts.build(shown_UK), 400
    mine = ours.sample(shown_UK, n, seeds=[5], guidance=4.0, spread=False)[0, :, 0]
    torch.manual_seed(0)
    theirs = peer.sample(prompts, n, guidance=4.0, greedy=False)[0, :, 0]
    none = torch.zeros(1, 1, 1, dtype=torch.long)
    with torch.no_grad():
        with_history, without = (
            ours.logits(one, none)[0, 0, 0] for one in (prompts, prompts.unconditional(ours.prompts.pad_id))
        )
    p_K, order = (without + 4.0 * (with_history - without)).softmax(-1).sort(descending=True)
    bin_K = torch.empty_like(order)
    bin_K[order] = (8 * (p_K.cumsum(0) - p_K)).long()
    a, b = (torch.bincount(bin_K[codes], minlength=8).double() for codes in (mine, theirs))
    share = torch.zeros(8).index_add_(0, bin_K[order], p_K).double()
    # 7 degrees of freedom: the 99.95 % quantile is 26.
    assert ((a - b).square() / (a + b)).sum() < 26
    assert ((a - n * share).square() / (n * share)).sum() < 26
    # And the bins would have seen sampling without guidance.
    unguided = torch.bincount(bin_K[ours.sample(shown_UK, n, seeds=[5], spread=False)[0, :, 0]], minlength=8)
    assert ((unguided - n * share).square() / (n * share)).sum() > 26


def test_our_text_step_learns_and_scores_tokens_as_the_plain_model_does(tmp_path: Path) -> None:
    prompts = grpo_step.write_model(tmp_path, seed=0)
    ours = grpo_step.Ours(tmp_path, prompts, seed=0)
    tokens_UnL = ours.sample()
    with torch.no_grad():
        packed = ours.log_prob(tokens_UnL)
        plain = LlamaForCausalLM.from_pretrained(tmp_path)
        whole = torch.cat([ours.ids_UP[:, None].expand(-1, tokens_UnL.shape[1], -1), tokens_UnL], 2).flatten(0, 1)
        logits = plain(whole).logits[:, grpo_step.PROMPT_TOKENS - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, tokens_UnL.flatten(0, 1)[..., None])[..., 0].view(packed.shape)
    torch.testing.assert_close(packed, expected, atol=1e-4, rtol=1e-4)
    rewards = [ours.step() for _ in range(8)]
    assert sum(rewards[-2:]) > sum(rewards[:2]) + 0.05


def test_reward_curves_far_apart_are_told_from_curves_that_are_not() -> None:
    rising = [{"rewards": [0.1 + 0.01 * step + 0.02 * (seed % 2) for step in range(20)]} for seed in range(3)]
    flat = [{"rewards": [0.1 + 0.02 * (seed % 2)] * 20} for seed in range(3)]
    assert grpo_step.curves({"ours": rising, "other": rising})["largest_gap_in_standard_errors"] == 0
    assert grpo_step.curves({"ours": rising, "other": flat})["largest_gap_in_standard_errors"] > 5


def test_the_methods_are_those_of_the_stage_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    assert methods.known() == ("base", *align.METHODS, *methods.VARIANTS)
    with pytest.raises(ConfigError, match="method 'magic' is unknown; choose from base"):
        methods.compare(methods.Asked(workspace=tmp_path, methods=("magic",), seeds=(0,)), print)
    with pytest.raises(DataError, match="holds no finished evaluation; run `couturier retrain`"):
        methods.compare(methods.Asked(workspace=tmp_path, methods=("grpo",), seeds=(0,)), print)


def test_a_person_counts_once_however_many_windows_and_seeds_they_have() -> None:
    rows = [("a", 0, 1.0), ("a", 1, 0.0), ("b", 2, 1.0)]
    parts = [
        pl.DataFrame(
            [("grpo", user, window, "judge", value + seed) for user, window, value in rows],
            schema=["row", "user_id", "window", "metric", "value"],
            orient="row",
        )
        for seed in (0, 1)
    ]
    found = methods.by_person(parts)
    assert found == {"judge": {"a": 1.0, "b": 1.5}}
    assert methods.interval(found, "judge")[0] == 1.25
    assert methods.difference(found, {"judge": {"b": 1.0}}, "judge") == [0.5, 0.5, 0.5]


def test_a_window_with_too_few_items_to_choose_from_misses_with_the_rest() -> None:
    score = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    among = torch.tensor([[False, True, True], [True, False, False]])
    basket = torch.tensor([[True, False, True], [True, True, True]])
    assert ceiling.hits(score, among, basket, 2).tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert ceiling.hits(score, among, basket, 0).shape == (2, 0)
