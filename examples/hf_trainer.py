"""Train a small transformer with NGOptimizer as the optimizer of a Hugging Face Trainer.

    pip install -e ".[frameworks]"
    python examples/hf_trainer.py

Nothing is downloaded: the data are sequences that count upwards in steps of three from a random
start.
"""

from tempfile import TemporaryDirectory

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from l2o_graph import NGOptimizer

TOKENS, LENGTH = 32, 16


def sequences(number: int) -> list[dict[str, torch.Tensor]]:
    """Draw sequences (16,) of tokens, which are also the labels."""
    start = torch.randint(0, TOKENS, (number, 1))
    rows = (start + 3 * torch.arange(LENGTH)) % TOKENS
    return [{"input_ids": row, "labels": row} for row in rows]


def main(steps: int = 100) -> tuple[float, float]:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=TOKENS,
        n_positions=LENGTH,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=32,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=sequences(1024),
            eval_dataset=sequences(256),
            # The Trainer adds its usual linear decay of the learning rate.
            optimizers=(NGOptimizer(model.named_parameters()), None),
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    print(f"test loss {before:.3f} before, {after:.3f} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main()
