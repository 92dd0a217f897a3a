"""What a placement is judged by (docs/routing.md, The model)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Weights of the objective, per token of the planning trace."""

    b_host: float = 1.0  # a row to a remote host
    b_dev: float = 0.125  # a row to a shard, wherever it is
    mu: float = 0.0  # times the largest load, in pairs, beyond what the cap does
    kappa: float = 0.0  # times the largest host's ingress, in rows
    nu: float = 4096.0  # moving one expert's weights, in rows there and back (1.5 x its width)
    horizon_tokens: float = 1e6  # tokens that the new placement will serve
    load_eps: float = 0.04  # load of every shard <= (1 + load_eps) x mean, where it can be
    load_price: float = 16.0  # rows a token for all of the load over that
    load_margin: float = 0.03  # of a layer's load, over EPLB's: beyond it a plan is repaired
    rounds: int = 60  # kicks of the local search, per seed: care against planning time
    bundles_max: int = 24_000  # that a search looks at, of one layer; a sample where there are more
