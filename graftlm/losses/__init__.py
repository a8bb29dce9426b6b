"""LOSSES: the table of every objective, pure functions on log-probabilities -> (sum, count, metrics).

An objective is given log p of each target, in nats, under the policy and, where it asks for it, under the reference,
and says what to minimise as a sum and what to divide it by. Over accumulated packs and several devices only sums add
up, so nothing is divided here. A new one is its file, its line here, and its comparison in the tests.
"""

from graftlm.losses import cpo, distillation, dpo, dpop, dro, kto, orpo, policy_gradient, simpo, sppo, supervised
from graftlm.losses.base import Batch, Loss, LossConfig, LossSum, Metrics, answers, pairs, tokens

__all__ = ["LOSSES", "Batch", "Loss", "LossConfig", "LossSum", "Metrics"]

LOSSES: dict[str, Loss] = {
    "cpo": Loss(cpo.CpoConfig, cpo.value, pairs, rows="pairs"),
    "distillation": Loss(distillation.DistillationConfig, distillation.value, tokens, rows="answers"),
    "dpo": Loss(dpo.DpoConfig, dpo.value, pairs, rows="pairs"),
    "dpop": Loss(dpop.DpopConfig, dpop.value, pairs, rows="pairs"),
    "dro": Loss(dro.DroConfig, dro.value, answers, rows="feedback", values=True),
    "kto": Loss(kto.KtoConfig, kto.value, answers, rows="feedback", statistic=kto.divergence),
    "orpo": Loss(orpo.OrpoConfig, orpo.value, pairs, rows="pairs"),
    "policy-gradient": Loss(
        policy_gradient.PolicyGradientConfig, policy_gradient.value, policy_gradient.count, rows="rewards"
    ),
    "pretraining": Loss(supervised.PretrainingConfig, supervised.value, tokens, rows="text"),
    "simpo": Loss(simpo.SimpoConfig, simpo.value, pairs, rows="pairs"),
    "sppo": Loss(sppo.SppoConfig, sppo.value, answers, rows="feedback"),
    "supervised": Loss(supervised.SupervisedConfig, supervised.value, tokens, rows="answers"),
}
