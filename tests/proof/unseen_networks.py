"""Right loops on recurrent, convolutional and attending networks and on a gradient penalty."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.proof.unseen_common import (
    Book,
    adam,
    generator,
    images,
    micro_batches,
    momentum,
    seeded,
    sentences,
    sgd,
    two_layers,
    values,
)
from tests.proof.unseen_models import plain

BOOK = Book()


class Smooth(nn.Module):
    """Returns the norm of the gradient by its inputs too, for a penalty by sample."""

    def __init__(self):
        super().__init__()
        self.layers = two_layers(5, 12, 1)

    def forward(self, x):
        x = x.detach().requires_grad_()
        y = self.layers(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y, slope


def penalised(outputs, targets):
    return F.mse_loss(outputs[0], targets) + 0.1 * (outputs[1].norm(dim=1) - 1).square().mean()


@BOOK.right_case("model")
def gradient_penalty():
    return plain(Smooth, penalised, batch=values, optimizer=momentum)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 8), nn.Parameter(0.1 * torch.randn(7, 8))
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.RMSNorm(8), nn.Linear(8, 3)

    def forward(self, ids, mask):
        x = self.embed(ids) + self.place
        x = x + self.attend(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        return self.head(self.norm(x).mean(1))


def masked():
    ids, labels = sentences()
    return dict(ids=ids, mask=labels == -100), labels[:, 0] % 3


@BOOK.right_case("model")
def attention_with_mask():
    return plain(Attention, batch=masked, optimizer=adam)


class Pictures(nn.Module):
    """Convolutions whose stages all give an output, as in deep supervision."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=2)
        self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x):
        a = F.relu(self.first(x)).to(memory_format=torch.channels_last)
        b = F.relu(self.second(a))
        return [head(h.mean((2, 3))) for head, h in zip(self.heads, (a, b), strict=True)]


@BOOK.right_case("model")
def deep_supervision():
    return plain(Pictures, lambda out, y: sum(F.cross_entropy(o, y) for o in out), batch=images)


def flattened():
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3)
    return seeded(lambda: nn.Sequential(*layers))


def two_channels():
    g = generator(12)
    return torch.randn(8, 2, 4, 4, generator=g), torch.randint(0, 3, (8,), generator=g)


@BOOK.right("model", model=flattened, batch=two_channels, optimizer=sgd)
def loop_in_another_layout(model, optimizer, batch, steps):
    for x, y in micro_batches(batch, steps):
        outputs = model(x.contiguous(memory_format=torch.channels_last))
        (F.cross_entropy(outputs, y, reduction="sum") / len(batch[0])).backward()
    optimizer.step()
    optimizer.zero_grad()


class Packed(nn.Module):
    """An LSTM over sequences of different length."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.head(out.sum(1) / lengths[:, None])


def sequences(n=15):
    g = generator(42)
    lengths = torch.randint(1, 6, (n,), generator=g)
    return (torch.randn(n, 5, 4, generator=g), lengths), torch.randint(0, 3, (n,), generator=g)


@BOOK.right_case("model")
def packed_lstm():
    return plain(Packed, batch=sequences, steps=5, optimizer=adam)
