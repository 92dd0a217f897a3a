"""Orders to copy experts of a `LocalCluster` from shard to shard."""

from support.local_cluster import LocalCluster

from remora.actors.expert_actor import ExpertActor
from remora.actors.launch import CopyOrder, ReplicaSource
from remora.actors.shard_model import ShardExperts


def held(actor: ExpertActor) -> ShardExperts:
    assert actor._shard is not None
    return actor._shard


def source(actor: ExpertActor) -> ReplicaSource:
    facts = actor.facts()
    assert facts.copies is not None
    member = facts.member
    return ReplicaSource(uid=member.uid, incarnation=member.incarnation, endpoint=facts.copies)


def order(
    cluster: LocalCluster, giver: int, experts: tuple[int, ...], *uids: str, term: int = 1
) -> CopyOrder:
    """Experts of every layer that shard `giver` serves, from its memory; the taker is told to ask
    `uids` in turn, if any, and no others."""
    actor = cluster.shards[giver]
    known = {p: e.digest for p, e in actor.facts().manifest.by_expert().items()}
    pairs = [(layer, expert) for layer in cluster.spec.moe_layers for expert in experts]
    return CopyOrder(
        digests={pair: known[pair] for pair in pairs},
        replicas=dict.fromkeys(pairs, uids or (f"shard-{giver}",)),
        sources=(source(actor),),
        term=term,
    )
