"""What the rows and figures of an evaluation are called, and what each means, for people who did not make them."""

from __future__ import annotations

METRICS: dict[str, tuple[str, str, int]] = {
    # name: (words, what it means, +1 higher is better | -1 lower | 0 neither)
    "basket_precision": ("In next basket", "Share of pictures whose nearest real item is in the next real basket.", 1),
    "basket_precision_new": (
        "In next, new only",
        "The same share, among the pictures that are not of the history: what copying cannot earn.",
        1,
    ),
    "hit@10": ("Hit@10", "The whole catalogue ranked by likeness to the pictures: is a next item in the first 10?", 1),
    "ndcg@10": ("NDCG@10", "The same ranking, where a higher place counts more, against the ideal order.", 1),
    "hr_target": ("Target drawn", "Share of moments where some picture is one given item of the next basket.", 1),
    "sim_next": ("Like next", "Cosine from a picture to the nearest item of the next basket.", 1),
    "sim_history": (
        "Like history",
        "Cosine from a picture to the nearest item of the history: personal, or copied.",
        0,
    ),
    "diversity": ("Diversity", "Mean distance between two pictures of one person: 0 means all alike.", 1),
    "distinct": ("Distinct", "Different items among the pictures of one person, as a share of them.", 1),
    "between_user": ("Between people", "Mean distance to the pictures of other people: 0 means all get the same.", 1),
    "novelty": ("Novelty", "Share of pictures whose nearest real item is not in the history.", 1),
    "copied": ("Copied", "Share of pictures whose nearest real item is in the history.", -1),
    "validity": ("Valid", "Share of pictures that are sharp: close, pixel by pixel, to some real tile.", 1),
    "mush": ("Mush", "Share of pictures that are far, pixel by pixel, from every real tile.", -1),
    "frechet": (
        "Fréchet",
        "Distance of all pictures from the real next items, on this report's own encoder: compare within this table only.",
        -1,
    ),
    "judge": ("Judge", "Score of the user-interest judge, in standard deviations. RL was trained on it.", 1),
    "category": ("Category", "Share of pictures whose category, as read off them, occurs in the next basket.", 1),
    "department": ("Department", "Share of pictures whose department, as read off them, occurs in the next basket.", 1),
    "brand": ("Brand", "Share of pictures whose brand, as read off them, occurs in the next basket.", 1),
    "tier": ("Price tier", "Share of pictures whose price tier, as read off them, occurs in the next basket.", 1),
    "coverage": ("Coverage", "Share of the catalogue that is drawn for somebody.", 1),
    "hit@20": ("Hit@20", "As Hit@10, for the first 20.", 1),
    "ndcg@20": ("NDCG@20", "As NDCG@10, for the first 20.", 1),
    "hit@50": ("Hit@50", "As Hit@10, for the first 50.", 1),
    "ndcg@50": ("NDCG@50", "As NDCG@10, for the first 50.", 1),
}
ROWS: dict[str, tuple[str, str, str]] = {
    # name: (words, what it is, group)
    "grpo": ("GRPO", "The generator after reinforcement learning, with the person's own history.", "ours"),
    "grpo_guided": (
        "GRPO, guided",
        "The generator after RL, pushed further towards the history while sampling.",
        "ours",
    ),
    "sft": ("SFT", "The generator after supervised fine-tuning only, with the person's own history.", "ours"),
    "sft_guided": ("SFT, guided", "SFT pushed further towards the history while sampling; no RL.", "ours"),
    "best_of_n": ("SFT, best of n", "SFT draws many, the judge keeps the best: the same compute without RL.", "ours"),
    "unconditional": ("No history", "The generator told nothing about the person.", "controls"),
    "wrong_user": ("Wrong person", "The generator after RL given somebody else's history.", "controls"),
    "wrong_user_sft": ("Wrong person, SFT", "The SFT generator given somebody else's history.", "controls"),
    "sft_wrong_user": ("Wrong person, SFT", "The SFT generator given somebody else's history.", "controls"),
    "random_item": ("Random item", "Real items drawn at random from the catalogue.", "controls"),
    "copy_last": ("Copy last", "The items the person took last.", "controls"),
    "copy_favourites": (
        "Copy favourites",
        "The items the person took most: hard to beat where people buy again.",
        "controls",
    ),
    "nearest_item": ("Nearest item", "The real items nearest to the mean of the history.", "controls"),
    "popularity": ("Popularity", "The items most taken by everybody.", "controls"),
    "oracle": ("Oracle", "The true next items, put through the codec: the best any drawing could do.", "oracle"),
}
GROUPS = {"ours": "Our generators", "controls": "Controls", "oracle": "Upper bound"}
# How a row is named inside a sentence.
SPOKEN: dict[str, str] = {
    "grpo_guided": "guided GRPO",
    "sft_guided": "guided SFT",
    "best_of_n": "best-of-n SFT",
    "unconditional": "no history",
    "random_item": "random items",
    "copy_last": "copying the last items",
    "copy_favourites": "copying the favourites",
    "nearest_item": "the nearest real items",
    "popularity": "popularity",
    "oracle": "the oracle",
}
