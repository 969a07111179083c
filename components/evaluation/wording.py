"""What the rows and figures of an evaluation are called, and what each means, for people who did not make them."""

from __future__ import annotations

METRICS: dict[str, tuple[str, str, int]] = {
    # name: (words, what it means, +1 higher is better | -1 lower | 0 neither)
    "basket_precision": ("In next basket", "Share of drawn pictures that are items of the next real basket.", 1),
    "hit@10": ("Hit@10", "How often the true next item is among the 10 catalogue items nearest to the pictures.", 1),
    "hit@20": ("Hit@20", "How often the true next item is among the 20 catalogue items nearest to the pictures.", 1),
    "hit@50": ("Hit@50", "How often the true next item is among the 50 catalogue items nearest to the pictures.", 1),
    "ndcg@10": ("NDCG@10", "As Hit@10, but a higher place in the list counts more.", 1),
    "ndcg@20": ("NDCG@20", "As Hit@20, but a higher place in the list counts more.", 1),
    "ndcg@50": ("NDCG@50", "As Hit@50, but a higher place in the list counts more.", 1),
    "sim_next": ("Like next", "Cosine likeness to the item really taken next, by an encoder no reward has seen.", 1),
    "sim_history": ("Like history", "Cosine likeness to the history. High means personal, or merely copied.", 0),
    "diversity": ("Diversity", "Mean distance between the pictures of one person: 0 means all alike.", 1),
    "coverage": ("Coverage", "Share of the catalogue that is drawn for somebody.", 1),
    "novelty": ("Novelty", "Share of pictures whose item is not in the history.", 1),
    "copied": ("Copied", "Share of pictures whose item is in the history.", -1),
    "validity": ("Valid", "Share of pictures that are sharp: close, pixel by pixel, to some real tile.", 1),
    "mush": ("Mush", "Share of pictures that look like no tile at all.", -1),
    "frechet": ("Fréchet", "Distance of all pictures from all real tiles on the independent encoder; 0 is alike.", -1),
    "judge": ("Judge", "Score of the user-interest judge, in standard deviations. RL was trained on it.", 1),
    "judge_reward": ("Judge", "Score of the user-interest judge, in standard deviations. RL was trained on it.", 1),
    "category": ("Category", "Share of pictures whose category, read from the picture, is that of a next item.", 1),
    "department": ("Department", "Share of pictures whose department, read from the picture, is that of a next item.", 1),
    "brand": ("Brand", "Share of pictures whose brand, read from the picture, is that of a next item.", 1),
    "tier": ("Price tier", "Share of pictures whose price tier, read from the picture, is that of a next item.", 1),
}
ROWS: dict[str, tuple[str, str, str]] = {
    # name: (words, what it is, group)
    "grpo": ("GRPO", "The generator after reinforcement learning, with the person's own history.", "ours"),
    "grpo_guided": ("GRPO, guided", "The generator after RL, pushed further towards the history while sampling.", "ours"),
    "sft": ("SFT", "The generator after supervised fine-tuning only, with the person's own history.", "ours"),
    "sft_guided": ("SFT, guided", "SFT pushed further towards the history while sampling; no RL.", "ours"),
    "best_of_n": ("SFT, best of n", "SFT draws many, the judge keeps the best: the same compute without RL.", "ours"),
    "unconditional": ("No history", "The generator told nothing about the person.", "controls"),
    "wrong_user": ("Wrong person", "The generator after RL given somebody else's history.", "controls"),
    "wrong_user_sft": ("Wrong person, SFT", "The SFT generator given somebody else's history.", "controls"),
    "sft_wrong_user": ("Wrong person, SFT", "The SFT generator given somebody else's history.", "controls"),
    "random_item": ("Random item", "Real items drawn at random from the catalogue.", "controls"),
    "copy_last": ("Copy last", "The items the person took last.", "controls"),
    "copy_favourites": ("Copy favourites", "The items the person took most: hard to beat where people buy again.", "controls"),
    "nearest_item": ("Nearest item", "The real items nearest to the mean of the history.", "controls"),
    "popularity": ("Popularity", "The items most taken by everybody.", "controls"),
    "oracle": ("Oracle", "The true next items, put through the codec: the best any drawing could do.", "oracle"),
}
GROUPS = {"ours": "Our generators", "controls": "Controls", "oracle": "Upper bound"}
