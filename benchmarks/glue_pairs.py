"""More pairs of a task's own training sentences, labelled by the fine-tuned dense model; no other part is looked at.

Every sentence is paired with others at ranks of similarity drawn evenly on a logarithmic scale, so that close pairs,
which are rare by chance, are as frequent as far ones ("Augmented SBERT", Thakur et al. 2021, with one model as judge
and student of another size).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ffsplit.evaluate.embeddings import sentence_embeddings
from ffsplit.tasks.encode import Encoded
from ffsplit.tasks.examples import Examples
from ffsplit.tasks.finetune import predict
from ffsplit.train.loop import Precision


def sentences_of(train: Examples) -> tuple[str, ...]:
    """The distinct sentences, in the order of their first appearance."""
    return tuple(dict.fromkeys((*train.first, *(train.second or ()))))


def neighbours(embeddings: Tensor, count: int, seed: int) -> np.ndarray:
    """``[count, 2]`` numbers of different sentences; each is the first of a pair as often as any other."""
    generator = np.random.default_rng(seed)
    total = len(embeddings)
    unit = torch.nn.functional.normalize(embeddings, dim=-1)
    left = np.concatenate([generator.permutation(total) for _ in range(-(-count // total))])[:count]
    ranks = np.exp(generator.uniform(0, np.log(total - 1), size=count)).astype(np.int64)
    right = np.empty_like(left)
    for rows in np.array_split(np.arange(count), max(count // 1024, 1)):
        order = (unit[left[rows]] @ unit.T).argsort(dim=-1, descending=True)
        # Rank 0 is the sentence itself, or one that no model tells from it.
        right[rows] = order.cpu().numpy()[np.arange(len(rows)), ranks[rows]]
    differ = left != right
    return np.stack([left[differ], right[differ]], 1)


def pairs(
    train: Examples, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> Examples:
    """Unlabelled pairs of the training sentences (labels are 0); ``model`` says which are similar."""
    sentences = sentences_of(train)
    embeddings = sentence_embeddings(model, tokenizer, sentences, batch_size=256, seq_len=128)
    chosen = neighbours(embeddings.to(model.device), count, seed)
    first, second = (tuple(sentences[row] for row in column) for column in chosen.T)
    return Examples(first, second, np.zeros(len(first), train.labels.dtype), f"{count} pairs of {train.name}")


def judged(data: Encoded, teacher: PreTrainedModel, precision: Precision) -> Encoded:
    """The examples with the teacher's outputs for labels."""
    outputs = torch.from_numpy(predict(teacher, data, precision)).to(data.labels.device)
    labels = outputs.squeeze(-1) if data.labels.is_floating_point() else outputs.argmax(-1)
    return replace(data, labels=labels.to(data.labels))


def joined(one: Encoded, other: Encoded) -> Encoded:
    """All examples of both, padded to the longer."""
    longest = max(len(part.inputs["input_ids"][0]) for part in (one, other))

    def padded(tensor: Tensor, value: Tensor) -> Tensor:
        missing = longest - tensor.shape[1]
        return torch.cat([tensor, value.expand(len(tensor), missing)], 1) if missing else tensor

    inputs = {}
    for name, tensor in one.inputs.items():
        # What stands behind the shortest example is padding, in every column of the tokenizer.
        short = int(one.lengths.argmin())
        value = tensor[short, -1:] if name != "attention_mask" else tensor.new_zeros(1)
        inputs[name] = torch.cat([padded(tensor, value), padded(other.inputs[name], value)])
    return Encoded(inputs, torch.cat([one.labels, other.labels]), np.concatenate([one.lengths, other.lengths]))
