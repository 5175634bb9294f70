"""CrossQ of sbx (Bhatt et al., 2024) on a pendulum, with our batch renormalization."""

import numpy as np
import sbx
import sbx.crossq.policies
from agreement import difference

WARMUP, AFTER = 30, 10


def train():
    """After each step of training on what random actions saw: the critic's loss and values."""
    settings = {"net_arch": [32, 32], "renorm_warmup_steps": WARMUP}
    agent = sbx.CrossQ(
        "MlpPolicy", "Pendulum-v1", seed=0, learning_starts=300, policy_kwargs=settings
    )
    agent.learn(300)
    states, actions = (
        getattr(agent.replay_buffer, name)[:256, 0] for name in ("observations", "actions")
    )
    losses, values = [], []
    for _ in range(WARMUP + AFTER):
        agent.train(gradient_steps=1, batch_size=64)
        losses.append(agent.logger.name_to_value["train/critic_loss"])
        values.append(predict(agent.policy.qf_state, states, actions))
    return np.array(losses), np.array(values), agent


def predict(critic, states, actions, batch_stats=None):
    variables = {"params": critic.params, "batch_stats": batch_stats or critic.batch_stats}
    return critic.apply_fn(variables, states, actions, train=False)


def test_the_critics_first_steps_agree(monkeypatch, from_guide, row):
    losses, values, _ = train()
    monkeypatch.setattr(sbx.crossq.policies, "BatchRenorm", from_guide("sbx", "BatchRenorm"))
    our_losses, our_values, agent = train()
    stats = agent.policy.qf_state.batch_stats["VmapCritic_0"]["BatchRenorm_0"]
    assert set(stats) == {"mean", "var", "steps"}  # theirs has its limits there, too
    assert set(stats["steps"].tolist()) == {WARMUP + AFTER}

    found = [difference(*pair) for pair in zip(our_values, values, strict=True)]
    largest = max(*found[:WARMUP], difference(our_losses[:WARMUP], losses[:WARMUP]))
    assert largest < 1e-5
    row(
        f"CrossQ on a pendulum: {WARMUP} steps of the critic, until its warm-up ends",
        "sbx-rl",
        largest,
        f"`BatchRenorm`, as in the guide; {AFTER} steps after the warm-up values differ by "
        f"{found[-1]:.0e}, as epsilon stands elsewhere",
    )
