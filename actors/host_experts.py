"""Experts that read rows on the host, for a model that may compute elsewhere."""

from torch import Tensor

from remora.actors.dense_model import DenseModel
from remora.actors.step_context import ExpertsFn
from remora.kernels.device import CPU


def on_host(experts: ExpertsFn, model: DenseModel) -> ExpertsFn:
    """`experts`, with rows brought to the host and answers back to the device of `model`."""
    if model.device == CPU:
        return experts

    def ask(
        layer: int, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, num_tokens: int
    ) -> Tensor:
        rows = (hidden_TD.to(CPU), index_TK.to(CPU), weights_TK.to(CPU))
        return experts(layer, *rows, num_tokens).to(hidden_TD.device)

    return ask
