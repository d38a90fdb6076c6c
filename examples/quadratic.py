# %% [markdown]
# # A curve out of straight lines
#
# Training has three parts: a model with parameters, a loss that says how wrong it is, and steps
# downhill along the loss's gradient. Here they fit a curve through noisy points: first with a
# formula of the right form, then with a neural network, which needs none. The network consists of
# lines `m*x + b` clipped at zero, which fastnn computes in one operator.

# %%
import copy

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.nn.functional import mse_loss

import fastnn

# %% [markdown]
# ## The points
#
# They lie on 3x² + 2x + 1, with noise of variance 1: no curve brings the mean squared error much
# below 1, except by following the noise.

# %%
torch.manual_seed(0)
x = torch.linspace(-2, 2, 100).unsqueeze(1)  # a column: each point is a row
y = 3 * x**2 + 2 * x + 1 + torch.randn_like(x)


def draw(title, predict, losses):
    """Draws the fit on the left and the losses on the way to it on the right."""
    print(f"{title}: loss {losses[0]:.1f} -> {losses[-1]:.2f}")
    _, (fit, way) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    fit.scatter(x, y, s=6, color="#8d99ae")
    fit.plot(x, predict(x).detach(), color="#d1495b")
    fit.set(title=title, xlabel="x")
    way.semilogy(losses, color="#30638e")
    way.set(title="loss", xlabel="step")
    plt.show()


# %% [markdown]
# ## A quadratic
#
# Gradient descent by hand: `backward` says how the loss changes with `a`, `b` and `c`, and each of
# them moves a little in the opposite direction.

# %%
abc = torch.zeros(3, requires_grad=True)


def quadratic(x):
    a, b, c = abc
    return a * x**2 + b * x + c


losses = []
for _ in range(100):
    loss = mse_loss(quadratic(x), y)
    loss.backward()
    with torch.no_grad():
        abc -= 0.1 * abc.grad
        abc.grad = None
    losses.append(loss.item())

draw("a*x² + b*x + c", quadratic, losses)

# %% [markdown]
# ## Two rectified lines
#
# Suppose we didn't know the form. A rectified linear unit is a line that stops at zero:
# `relu(m*x + b)`. `LinearReLU(1, 2)` holds two of them: the product, the sum and the clipping are
# one operator, their gradients another. The loop is the one above, with `SGD` for the step. The
# direction of each unit is drawn at random; here there is one for each side.


# %%
def train(model, steps, lr):
    """Gradient descent; returns the loss before each step."""
    optimizer = fastnn.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class SumOfUnits(fastnn.nn.LinearReLU):
    def forward(self, x):
        return super().forward(x).sum(dim=1, keepdim=True)


two = SumOfUnits(1, 2)
draw("two units", two, train(two, steps=300, lr=0.01))

# %% [markdown]
# ## Many
#
# With more corners the lines approach the curve. A weight for each unit lets them go down as well
# as up: that is a neural network with one hidden layer, and with enough units it fits any curve.

# %%
many = nn.Sequential(fastnn.nn.LinearReLU(1, 50), nn.Linear(50, 1))
draw("fifty units, weighted", many, train(many, steps=500, lr=0.01))

# %% [markdown]
# ## An existing model
#
# Nothing has to be rewritten: `fuse` finds the pairs of `Linear` and `ReLU` in a model of PyTorch's
# own layers. The parameters stay the same objects, so both models learn when one is trained.

# %%
stock = nn.Sequential(nn.Linear(1, 50), nn.ReLU(), nn.Linear(50, 1))
fused = fastnn.fuse(stock)
train(fused, steps=500, lr=0.01)
print(fused)
print("the same numbers:", torch.allclose(fused(x), stock(x)))

# %% [markdown]
# ## In one call
#
# `train_step` turns the loop's lines into one call: forward, loss, backward and update. Losses,
# parameters and the optimizer's state are the loop's, so either can continue where the other
# stopped.

# %%
model = nn.Sequential(fastnn.nn.LinearReLU(1, 50), nn.Linear(50, 1))
twin = copy.deepcopy(model)
optimizer = fastnn.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
step = fastnn.train_step(model, mse_loss, optimizer)
losses = [step(x, y).item() for _ in range(500)]
print("the loop's losses:", np.allclose(losses, train(twin, steps=500, lr=0.01)))
