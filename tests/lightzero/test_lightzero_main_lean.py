"""Short steps on LightZero's main: the visits and values of its own steps, bit for bit where the
processor's products are.

Runs where PAGED_KV_LIGHTZERO_MAIN names a checkout of LightZero's main.
"""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest

if not os.environ.get("PAGED_KV_LIGHTZERO_MAIN"):
    pytest.skip(
        "not run: PAGED_KV_LIGHTZERO_MAIN names no checkout of LightZero's main",
        allow_module_level=True,
    )

from lightzero_main_drives import build, search_with_lightzero

from paged_kv.integrations.lightzero import attach


@pytest.mark.parametrize("attention", ["gathered", "pages"])
@pytest.mark.parametrize("manager", [False, True], ids=["dicts", "manager"])
@pytest.mark.parametrize("keys", ["node", "latent"])
@pytest.mark.parametrize("mode", ["rotary", "shift", "exact"])
def test_visits_are_the_same(mode: str, keys: str, manager: bool, attention: str) -> None:
    own = attach(build(mode, manager, envs=4), keys=keys, step="lightzero")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lean = attach(build(mode, manager, envs=4), keys=keys, step="lean", attention=attention)
    wanted = search_with_lightzero(own)
    found = search_with_lightzero(lean)
    assert [visits for visits, _ in found] == [visits for visits, _ in wanted]
    # the inverse transform of values makes more of the last bits
    rounding = 1e-4 if attention == "gathered" else 1e-3
    for (_, one), (_, other) in zip(found, wanted):
        np.testing.assert_allclose(one, other, rtol=rounding, atol=1e-5)
    assert lean.world_model.paged.lean.steps > 100
    lean.world_model.paged.cache.check()


def test_windows_rebuilt_from_tokens_keep_mains_own_steps() -> None:
    with pytest.warns(UserWarning, match="collects the tokens"):
        lean = attach(build("rebuild", envs=4), step="lean")
    search_with_lightzero(lean)
    assert lean.world_model.paged.lean.steps == 0


def test_clipped_logits_keep_mains_own_steps() -> None:
    with pytest.warns(UserWarning, match="use_policy_logits_clip"):
        lean = attach(build("rotary", envs=4, use_policy_logits_clip=True), step="lean")
    search_with_lightzero(lean)
    assert lean.world_model.paged.lean.steps == 0


def test_a_long_episode_extends_the_table_of_rotations() -> None:
    from paged_kv.integrations.lightzero.shared.lean.places import rotations

    model = build("rotary", envs=4).world_model
    before = model.transformer.freqs_cis.clone()
    end = len(before)
    found = rotations(model.transformer, [[1, end + 3]], before.device)
    assert len(model.transformer.freqs_cis) > end + 3
    assert np.array_equal(found[0, 0, 0, 0].numpy(), before[1].numpy())
    assert np.array_equal(found[0, 1, 0, 0].numpy(), model.transformer.freqs_cis[end + 3].numpy())


def test_a_model_that_stays_the_same_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from paged_kv.integrations.lightzero.shared.lean import running

    tried = []
    check = running.check
    monkeypatch.setattr(running, "check", lambda *all: (tried.append(1), check(*all)))
    lean = attach(build("shift", envs=4), step="lean")
    search_with_lightzero(lean)
    assert len(tried) == 1
    assert lean.world_model.paged.lean.steps > 100
