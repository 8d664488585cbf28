"""Pretraining by next-token prediction, on `transformers.Trainer`.

Slow to import. Knows neither texts nor sizes nor paths.

Axes:
    B  row of tokens
    T  token of a row
"""

import tempfile

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from infini_retrofit.pipeline.device import start_run
from infini_retrofit.scoring.labels import next_tokens
from infini_retrofit.scoring.losses import token_nlls
from infini_retrofit.training.loop import BaseTrainer, training_arguments

# As Pythia was trained; the Trainer spares biases and norms the decay.
WEIGHT_DECAY, BETAS = 0.1, (0.9, 0.95)


class _NextToken(nn.Module):
    """A language model with its loss, whose logits never leave it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """Score every token but the first of each row; the mean, in nats."""
        hidden_states = self.model.base_model(input_ids, use_cache=False).last_hidden_state
        predicting, targets = next_tokens(input_ids, hidden_states)
        head = self.model.get_output_embeddings().weight
        return {"loss": token_nlls(predicting, head, targets).mean()}


class _Pretrainer(BaseTrainer):
    task, lr_name = "pretraining", "models.*.lr"


def pretrain(
    model: PreTrainedModel,
    rows: Int[Tensor, "B T"],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> None:
    """Train all weights in place; equal arguments give equal weights on one machine's processor.

    Args:
        model: float32, and left so, in evaluation mode.
        rows: the tokens, each row predicted on its own.
        epochs: how often each row is seen.
        batch_size: rows a step.
        lr: at its peak.
        seed: of the order of the rows.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    trainee = _NextToken(model)
    with tempfile.TemporaryDirectory() as unused:
        _, dtype = start_run()
        arguments = training_arguments(
            unused,
            dtype,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            save_strategy="no",
        )
        dataset = [{"input_ids": row} for row in rows]
        trainer = _Pretrainer(model=trainee, args=arguments, train_dataset=dataset)
        trainer.train()
    model.cpu().eval()
    with torch.no_grad():
        trainer.require_finite(trainee(rows[:batch_size])["loss"].item(), "in the last step")
