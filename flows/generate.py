"""``couturier generate``: a registered model draws in this process, and the pictures become files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from couturier.components.errors import ConfigError
from couturier.components.generator.words import Extractor, TitleConfig
from couturier.components.lineage.workspace import Workspace
from couturier.flows.service import bundle_folder, version_in_use
from couturier.serving.bundle import Bundle, History, Picture
from couturier.serving.pictures import grid, png_bytes
from couturier.serving.sampling import Sampling
from couturier.serving.titles import Titles

COLUMNS = 8


def draw(
    *,
    user: str,
    history: str,
    n: int,
    guidance: float,
    temperature: float,
    seed: int,
    folder: Path,
    scale: int,
    model: str,
    titles: str = "",
    likeliest: bool = False,
    new: bool = False,
) -> dict[str, Any]:
    """Draw ``n`` pictures for a user, or for item ids, and write them with a grid into ``folder``.

    Args:
        likeliest: the likeliest pictures, all different, instead of random draws.
        new: the same, passing over what the history holds.
        titles: who proposes titles (``TitleConfig.writer``); empty for the nearest items' own ones.

    Returns:
        What ``couturier generate --json`` prints.

    Raises:
        ConfigError: neither or both of ``user`` and ``history``, or a value out of range.
        UnknownUserError: the model knows no such user.
        LineageError: there is no such model.
    """
    if bool(user) == bool(history):
        raise ConfigError("name whom to draw for: either --user ID or --history ITEM,ITEM,… (item ids with commas).")
    sampling = Sampling(n=n, guidance=guidance, temperature=temperature, seed=seed, likeliest=likeliest or new, new=new)
    workspace = Workspace.find()
    version = version_in_use(workspace, model)
    bundle = Bundle.load(bundle_folder(workspace, version))
    known = bundle.history_of(user) if user else bundle.history_from([part.strip() for part in history.split(",")])
    began = time.perf_counter()
    drawn = bundle.generate([known], sampling)[0]
    took = time.perf_counter() - began
    paths = _write(folder, bundle, known, drawn, scale)
    own, ids = bundle.catalogue.items["title"].to_list(), bundle.catalogue.item_ids
    titling = Titles(bundle, TitleConfig(writer=titles or Extractor.name))
    named = titling.of(known, drawn) if titles else titling.own(drawn)
    return {
        "user": user or None,
        "model": {"name": "couturier", "version": version.number, "alias": next(iter(version.aliases), None)},
        "bento": version.bento,
        "seed": seed,
        "s": round(took, 3),
        "history": [{"item_id": ids[i], "title": own[i]} for i in known.items],
        "pictures": [
            {
                "id": picture.id,
                "path": str(path),
                "nearest": {"item_id": ids[picture.nearest], "title": own[picture.nearest]},
                "title": title.text,
                "titled_by": title.by,
            }
            for picture, path, title in zip(drawn, paths, named, strict=True)
        ],
        "grid": str(folder / "grid.png"),
        "attribution": bundle.catalogue.attribution,
    }


def _write(folder: Path, bundle: Bundle, known: History, drawn: Sequence[Picture], scale: int) -> list[Path]:
    """One PNG a picture, and ``grid.png``: a row or two of the history, a gap, then what was drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for place, picture in enumerate(drawn, start=1):
        path = folder / f"{place:02d}.png"
        path.write_bytes(png_bytes(picture.rgb_HWC, scale=scale))
        paths.append(path)
    above = grid([bundle.catalogue.rgb_IHWC[i] for i in known.items], columns=COLUMNS)
    below = grid([picture.rgb_HWC for picture in drawn], columns=COLUMNS)
    gap = np.full((above.shape[0] // 4, above.shape[1], 3), 255, np.uint8)
    (folder / "grid.png").write_bytes(png_bytes(np.concatenate([above, gap, below]), scale=scale))
    return paths
