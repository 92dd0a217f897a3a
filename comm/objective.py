"""What a placement is judged by (traffic.md, Objective)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Weights of traffic.md's objective, per token of the planning trace."""

    b_host: float = 1.0  # a row to a remote host
    b_dev: float = 0.125  # a row to a shard, wherever it is
    mu: float = 0.0  # times the largest load, in pairs, beyond what the cap does
    kappa: float = 0.0  # times the largest host's ingress, in rows
    nu: float = 4096.0  # moving one expert's weights, in rows (three matrices: 3 x its width)
    horizon_tokens: float = 1e6  # tokens that the new placement will serve
    load_eps: float = 0.04  # load of every shard <= (1 + load_eps) x mean, where it can be
    rounds: int = 60  # kicks of the local search, per seed: care against planning time
